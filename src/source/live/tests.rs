mod asked_once;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const LEN: Bytes = Bytes::new(1 << 40);
const BLOCK: Bytes = Bytes::new(4096);
/// The length of the first range of a query.
const FIRST: Bytes = Bytes::new(64 << 20);

/// A source whose next answers are listed. It panics at a query without one.
#[derive(Default)]
struct ListedAnswers {
    answers: Mutex<VecDeque<Result<Vec<Extent>, QueryError>>>,
    unusable: AtomicBool,
    /// The ranges of all queries.
    asked: Mutex<Vec<Vec<Range<Bytes>>>>,
}

impl LiveSource for ListedAnswers {
    fn name(&self) -> String {
        "listed".to_owned()
    }

    fn len(&self) -> Bytes {
        LEN
    }

    fn block(&self) -> Bytes {
        BLOCK
    }

    fn longest_query(&self) -> Option<Bytes> {
        Some(LEN)
    }

    fn extents(&self, ranges: &[Range<Bytes>]) -> Result<Vec<Extent>, QueryError> {
        self.asked.lock().unwrap().push(ranges.to_vec());
        self.answers.lock().unwrap().pop_front().expect("a query that is not expected")
    }

    fn answers(&self, ranges: &[Range<Bytes>]) -> Vec<Result<Vec<Extent>, QueryError>> {
        vec![self.extents(ranges)]
    }

    fn unusable(&self) -> Option<DenseReason> {
        self.unusable.load(Ordering::Relaxed).then(|| "unusable".into())
    }

    fn counters(&self) -> Option<IoCounters> {
        Some(IoCounters::default())
    }

    fn medium(&self) -> Option<u64> {
        None
    }

    fn unobserved(&self) -> Option<String> {
        None
    }
}

fn map(answers: impl IntoIterator<Item = Result<Vec<Extent>, QueryError>>) -> LiveMap<ListedAnswers> {
    let answers = Mutex::new(answers.into_iter().collect());
    LiveMap::new(ListedAnswers { answers, ..ListedAnswers::default() }, None)
}

fn extent(end: Bytes, kind: ExtentKind) -> Extent {
    Extent { end, kind }
}

fn error() -> Error {
    Error::failed("on purpose")
}

#[test]
fn where_a_query_fails_its_range_is_data() {
    let hole = extent(LEN, ExtentKind::Hole);
    let map = map([Err(QueryError::Ranges(error())), Ok(vec![hole])]);
    assert_eq!(map.extent_at(Bytes::ZERO), extent(FIRST, ExtentKind::Data));
    assert_eq!(map.extent_at(BLOCK), extent(FIRST, ExtentKind::Data), "remembered");
    assert_eq!(map.extent_at(FIRST), hole);
}

#[test]
fn where_the_device_fails_the_rest_of_it_is_data() {
    let map = map([Err(QueryError::Device(error()))]);
    assert_eq!(map.degraded(), None);
    assert_eq!(map.extent_at(BLOCK), extent(LEN, ExtentKind::Data));
    assert_eq!(map.extent_at(FIRST), extent(LEN, ExtentKind::Data), "remembered");
    assert_eq!(map.dense_because(), None);
    assert_eq!(map.degraded().unwrap().reason, format!("data where a query fails: {}", error()));
}

#[test]
fn answers_are_degraded_until_a_query_succeeds() {
    let hole = || vec![extent(BLOCK, ExtentKind::Hole)];
    let first = vec![Bytes::ZERO..BLOCK];
    let map = map([Err(QueryError::Ranges(error())), Ok(hole())]);
    let ask = || map.extent_in(map.query(&first), Bytes::ZERO, &first).kind;
    assert!(ask().is_data());
    assert!(map.degraded().is_some());
    assert!(ask().is_hole());
    assert_eq!(map.degraded(), None);
    map.data_without_query(BLOCK, BLOCK);
    assert!(map.degraded().unwrap().reason.contains("takes too long to find"));
}

#[test]
fn an_unusable_source_is_not_queried() {
    let map = map([]);
    map.source.unusable.store(true, Ordering::Relaxed);
    assert_eq!(map.extent_at(BLOCK), extent(LEN, ExtentKind::Data));
    assert_eq!(map.dense_because(), Some("unusable".into()));
}

#[test]
fn an_answer_without_the_offset_makes_its_block_data() {
    let map = map([Ok(vec![extent(Bytes::new(10), ExtentKind::Hole)]), Ok(Vec::new())]);
    assert_eq!(map.extent_at(Bytes::new(10)), extent(BLOCK, ExtentKind::Data));
    assert_eq!(map.extent_at(BLOCK), extent(LEN, ExtentKind::Data), "an answer without any extent");
}

#[test]
fn a_hole_is_queried_each_time_and_data_is_not() {
    let answer = || vec![extent(BLOCK, ExtentKind::Hole), extent(FIRST, ExtentKind::Data)];
    let map = map([Ok(answer()), Ok(vec![extent(FIRST, ExtentKind::Data)])]);
    assert_eq!(map.extent_at(Bytes::ZERO), extent(BLOCK, ExtentKind::Hole));
    assert_eq!(map.extent_at(BLOCK), extent(FIRST, ExtentKind::Data));
    assert_eq!(map.extent_at(Bytes::ZERO), extent(FIRST, ExtentKind::Data));
}

#[test]
fn the_extents_of_the_last_answer_are_expected_and_no_answer() {
    let answer = || vec![extent(BLOCK, ExtentKind::Hole), extent(FIRST, ExtentKind::Data)];
    let map = map([Ok(answer()), Ok(vec![extent(LEN, ExtentKind::Hole)])]);
    assert_eq!(map.expected_extent(BLOCK), None);
    map.extent_at(Bytes::ZERO);
    assert_eq!(map.expected_extent(BLOCK), Some(extent(FIRST, ExtentKind::Data)));
    assert_eq!(map.extent_at(Bytes::ZERO), extent(LEN, ExtentKind::Hole), "asked again");
    assert_eq!(map.expected_extent(BLOCK), Some(extent(LEN, ExtentKind::Hole)));
}

#[test]
fn where_much_is_expected_a_query_is_about_two_extents() {
    let ends: Vec<Bytes> = (1..=200).map(|index| Bytes::new(index * BLOCK.get())).collect();
    let kind = |index: usize| if index.is_multiple_of(2) { ExtentKind::Hole } else { ExtentKind::Data };
    let all: Vec<Extent> = ends.iter().enumerate().map(|(index, end)| extent(*end, kind(index))).collect();
    let two = vec![all[0], all[1]];
    // The device was written behind the first extent.
    let changed = vec![all[0], extent(ends[1], ExtentKind::Hole)];
    let map = map([Ok(all.clone()), Ok(two), Ok(changed), Ok(all.clone())]);
    let asked = |map: &LiveMap<ListedAnswers>| map.source.asked.lock().unwrap().pop().unwrap();
    map.extent_at(Bytes::ZERO);
    assert!(asked(&map)[0].end > ends[40], "many extents");
    assert_eq!(map.extent_at(Bytes::ZERO), all[0]);
    assert_eq!(asked(&map), [Bytes::ZERO..ends[1]], "two extents");
    map.extent_at(Bytes::ZERO);
    assert_eq!(asked(&map), [Bytes::ZERO..ends[1]]);
    map.extent_at(Bytes::ZERO);
    assert!(asked(&map)[0].end > ends[40], "many again: the last answer was not expected");
}
