//! The block status of an export as a source of extents.

use std::ops::Range;
use std::sync::Arc;

use super::client::Client;
use super::reply::RequestError;
use crate::error::Error;
use crate::map::Extent;
use crate::reason::DenseReason;
use crate::source::live::{LiveSource, QueryError, WriteEvidence};
use crate::sys::sysfs::IoCounters;
use crate::units::Bytes;

/// Whether writes over other connections are flushed before each block status query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushBeforeStatus {
    /// No flush. For bytes that are read over the connection of the block status, and for exports without other
    /// writers.
    No,
    /// A flush each time. For bytes that are read over another connection, as those of the kernel's NBD devices are.
    Yes,
}

/// The extents of an export, from block status queries to its server.
pub(super) struct ExportStatus {
    pub(super) client: Arc<Client>,
    pub(super) flush: FlushBeforeStatus,
    /// What this host counts of the device of the kernel's client. There are no counters of the export.
    pub(super) evidence: WriteEvidence,
}

/// What is data after a query failed.
fn query_error(failure: &RequestError) -> QueryError {
    let error = Error::failed(failure.to_string());
    match failure {
        // The server may be able to report the status of other ranges.
        RequestError::Server(_) => QueryError::Ranges(error),
        _ => QueryError::Device(error),
    }
}

impl LiveSource for ExportStatus {
    fn name(&self) -> String {
        self.client.uri().to_string()
    }

    fn len(&self) -> Bytes {
        self.client.size()
    }

    fn block(&self) -> Bytes {
        self.client.minimum_block()
    }

    fn longest_query(&self) -> Option<Bytes> {
        Some(self.client.longest_status())
    }

    fn extents(&self, ranges: &[Range<Bytes>]) -> Result<Vec<Extent>, QueryError> {
        join(ranges, self.client.block_status(ranges, self.flush)).map_err(|failure| query_error(&failure))
    }

    fn answers(&self, ranges: &[Range<Bytes>]) -> Vec<Result<Vec<Extent>, QueryError>> {
        let answers = self.client.block_status(ranges, self.flush).into_iter();
        answers.map(|answer| answer.map_err(|failure| query_error(&failure))).collect()
    }

    fn unusable(&self) -> Option<DenseReason> {
        self.client.no_status().map(|reason| reason.to_owned().into())
    }

    fn counters(&self) -> Option<IoCounters> {
        // An export has no counters, so remembered data is dropped only for its age.
        self.evidence.read()
    }

    fn medium(&self) -> Option<u64> {
        self.evidence.medium()
    }

    fn unobserved(&self) -> Option<String> {
        if self.client.has_lost_connection() {
            return Some("a connection was lost, so it may be another export now".to_owned());
        }
        self.evidence.unobserved()
    }
}

/// Joins the answers to adjacent ranges up to the first gap.
fn join(ranges: &[Range<Bytes>], answers: Vec<Result<Vec<Extent>, RequestError>>) -> Result<Vec<Extent>, RequestError> {
    let mut all: Vec<Extent> = Vec::new();
    for (range, answer) in ranges.iter().zip(answers) {
        match answer {
            Err(failure) if all.is_empty() => return Err(failure),
            Ok(extents) if all.last().is_none_or(|last| last.end == range.start) => {
                for extent in extents {
                    match all.last_mut() {
                        Some(last) if last.kind == extent.kind => last.end = extent.end,
                        _ => all.push(extent),
                    }
                }
            }
            _ => break,
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentKind;

    #[test]
    fn answers_are_joined_up_to_the_first_gap() {
        let bytes = Bytes::new;
        let ranges = [0..10, 10..20, 20..30].map(|range: Range<u64>| bytes(range.start)..bytes(range.end));
        let hole = |end| Extent { end: bytes(end), kind: ExtentKind::Hole };
        let data = |end| Extent { end: bytes(end), kind: ExtentKind::Data };
        for (answers, wanted) in [
            ([Ok(vec![hole(10)]), Ok(vec![hole(20)]), Ok(vec![data(30)])], Ok(vec![hole(20), data(30)])),
            ([Ok(vec![hole(9)]), Ok(vec![hole(20)]), Ok(vec![hole(30)])], Ok(vec![hole(9)])),
            ([Ok(vec![hole(15)]), Ok(vec![data(20)]), Ok(vec![data(30)])], Ok(vec![hole(15)])),
            (
                [Ok(vec![data(5), hole(10)]), Err(RequestError::Server(5)), Ok(vec![hole(30)])],
                Ok(vec![data(5), hole(10)]),
            ),
            ([Err(RequestError::Server(5)), Ok(vec![hole(20)]), Ok(vec![hole(30)])], Err(RequestError::Server(5))),
        ] {
            assert_eq!(join(&ranges, answers.to_vec()), wanted);
        }
    }
}
