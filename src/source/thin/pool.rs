//! Reads the metadata of a live pool without holding up its users.
//!
//! A transaction of a pool writes only to metadata blocks that are free in the last committed transaction, so that the
//! pool can recover from a crash. So the trees of that transaction stay complete until the next commit, and a read is
//! valid if no commit happened during it. Three observations of the metadata device prove that: no write is in flight
//! before and after the read, its counters of writes are the same, and the superblock is the same. (Equal superblocks
//! alone prove nothing: after two commits the roots can be in the same blocks again, with other leaves.) I/O counters
//! can be disabled, so they are used only while it is certain that they are enabled, and only if the read of the
//! superblock increased the counter of reads.
//!
//! If the pool commits during each attempt, its metadata snapshot is taken for the time of one read. A pool has only
//! one, which all programs share. If another program holds it, more attempts without it follow.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::debug;

use super::MetaBlock;
use super::changes::{Compared, DeviceChanges};
use super::error::{ThinError, ThinResult};
use super::held::MetadataSnapshot;
use super::metadata::{Metadata, read_superblock};
use super::params::{self, Mode, PoolTable};
use super::reader::MetadataReader;
use super::shared_reads::{Maps, SharedReads, Wanted};
use crate::error::plain;
use crate::map::FillMap;
use crate::reason::DenseReason;
use crate::source::Context;
use crate::sys::device::{self, DeviceId};
use crate::sys::dm::{Commit, Control, Table};
use crate::sys::iostats::CompleteAccounting;
use crate::sys::sysfs::{self, Activity, StatFile};
use crate::units::Sectors;

/// The number of attempts before the metadata snapshot is taken.
const FIRST_TRIES: usize = 3;
/// The number of attempts when the metadata snapshot cannot be taken.
const MORE_TRIES: usize = 8;
/// No further attempt begins after this time, so that a large tree is not read again and again.
const TRIES_TIME: Duration = Duration::from_secs(1);
/// The number of threads of one read. More than two gain nothing: one reads while the other one checks.
const THREADS: usize = 2;
/// The size of a superblock in sectors, by which its read increases the counter of the metadata device.
const SUPERBLOCK_SECTORS: u64 = 8;

/// A live pool.
pub struct LivePool {
    control: Arc<Control>,
    id: DeviceId,
    reads: Arc<SharedReads>,
    /// Whether no metadata snapshot may be taken.
    no_snapshots: bool,
}

/// The tables and the status of a pool. They are read again for each attempt, because metadata devices are replaced and
/// extended while the pool is in use.
struct LivePoolState {
    name: String,
    params: String,
    table: PoolTable,
    held_root: Option<MetaBlock>,
    mode: Mode,
}

/// The outcome of one attempt to read the last committed transaction.
enum ReadAttempt<T> {
    /// No commit happened during the read, so its result is valid, also if it is a failure.
    Valid(ThinResult<T>),
    /// A commit may have happened during the read, so its result is not valid.
    Interrupted,
}

/// What is read from the metadata of one transaction.
type Question<'a, T> = &'a dyn Fn(&LivePoolState, &Metadata) -> ThinResult<T>;

/// Two devices whose mapping trees are compared, with their lengths and the sizes of their mapped blocks.
#[derive(Clone, Copy, Debug)]
pub struct WantedChanges {
    /// The older device.
    pub older: Wanted,
    /// The newer one.
    pub newer: Wanted,
    /// Whether one of them has an external origin.
    pub over_origin: bool,
}

impl LivePool {
    /// The pool `id`.
    pub fn new(control: Arc<Control>, id: DeviceId, context: &Context) -> Self {
        Self { control, id, reads: context.thin.of(id), no_snapshots: context.no_metadata_snapshots }
    }

    /// The mapped blocks of a thin device. They include each block that was written by a write that completed before
    /// the call.
    ///
    /// # Errors
    /// When the pool has failed, needs a check or is suspended, when its metadata is damaged, and when it commits too
    /// often.
    pub fn map(&self, wanted: &Wanted) -> Result<FillMap, DenseReason> {
        let map = self.reads.take(*wanted, |wanted| self.maps(wanted))?;
        Ok(map.ok_or_else(too_fast)??)
    }

    /// What changed from one thin device to another one. Both are read from one transaction, which includes each block
    /// that was written by a write that completed before the call.
    ///
    /// # Errors
    /// As [`LivePool::map`].
    pub fn changes(&self, wanted: &WantedChanges) -> Result<DeviceChanges, DenseReason> {
        let read = |state: &LivePoolState, metadata: &Metadata| {
            state.check(metadata, &wanted.older)?;
            state.check(metadata, &wanted.newer)?;
            let [older, newer] =
                [&wanted.older, &wanted.newer].map(|device| Compared { id: device.id, len: device.len });
            DeviceChanges::read(metadata, older, newer, wanted.over_origin)
        };
        Ok(self.reads.alone(|| self.read(&read))?.ok_or_else(too_fast)??)
    }

    /// The maps of several devices from one read. There are none when the pool commits too often.
    fn maps(&self, wanted: &[Wanted]) -> Result<Maps, DenseReason> {
        let read = |state: &LivePoolState, metadata: &Metadata| {
            Ok(wanted.iter().map(|wanted| state.read(metadata, wanted)).collect())
        };
        match self.read(&read)? {
            Some(Err(error)) => Ok(vec![Err(error)]),
            maps => Ok(maps.transpose()?.unwrap_or_default()),
        }
    }

    /// Reads from one transaction. `None` when the pool commits too often.
    fn read<T>(&self, read: Question<'_, T>) -> Result<Option<ThinResult<T>>, DenseReason> {
        if let Some(result) = self.read_committed(FIRST_TRIES, read)? {
            return Ok(Some(result));
        }
        if let Some(result) = self.read_snapshot(read)? {
            return Ok(Some(result));
        }
        self.read_committed(MORE_TRIES, read)
    }

    /// Reads the last committed transaction, in up to `tries` attempts. `None` when the pool may have committed during
    /// each of them.
    fn read_committed<T>(&self, tries: usize, read: Question<'_, T>) -> Result<Option<ThinResult<T>>, DenseReason> {
        let start = Instant::now();
        for _ in (0..tries).take_while(|_| start.elapsed() < TRIES_TIME) {
            // The pool commits for this status, so that the metadata on disk has all writes that completed before.
            let state = self.state(Commit::Yes)?;
            match self.try_read(&state, read)? {
                ReadAttempt::Valid(result) => return Ok(Some(result)),
                ReadAttempt::Interrupted => debug!("{}: committed while its metadata was read", state.name),
            }
        }
        Ok(None)
    }

    fn try_read<T>(&self, state: &LivePoolState, read: Question<'_, T>) -> Result<ReadAttempt<T>, DenseReason> {
        let unreadable = |error| DenseReason::cannot("read the I/O counters of the metadata device", &error);
        let reader = state.open_metadata()?;
        let Some(idle) = IdleDevice::new(state.table.metadata).map_err(unreadable)? else {
            return Ok(ReadAttempt::Interrupted);
        };
        let reads_before = idle.stat.sectors_read().map_err(unreadable)?;
        let metadata = match Metadata::open(reader, MetaBlock::SUPERBLOCK) {
            Ok(metadata) => metadata,
            // A superblock that is written during its read looks damaged, and is not.
            Err(error) => {
                let still_idle = idle.is_still_idle().map_err(unreadable)?;
                return Ok(if still_idle { ReadAttempt::Valid(Err(error)) } else { ReadAttempt::Interrupted });
            }
        };
        if idle.stat.sectors_read().map_err(unreadable)?.get() < reads_before.get() + SUPERBLOCK_SECTORS {
            debug!("{}: its metadata device does not count reads", state.name);
            return Ok(ReadAttempt::Interrupted);
        }
        let result = read(state, &metadata);
        let same = read_superblock(metadata.reader(), MetaBlock::SUPERBLOCK)
            .is_ok_and(|(_, raw)| *raw == *metadata.raw_superblock());
        // The pool's table is read again too: a pool that was suspended right before its status did not commit for it.
        let is_valid = same && idle.is_still_idle().map_err(unreadable)? && self.is_still(state);
        Ok(if is_valid { ReadAttempt::Valid(result) } else { ReadAttempt::Interrupted })
    }

    /// Whether the pool has the same table as in `state`, and is not suspended.
    fn is_still(&self, state: &LivePoolState) -> bool {
        let table = self.control.table(self.id);
        table.is_ok_and(|table| !table.suspended && only_target(table).is_ok_and(|(_, params)| params == state.params))
    }

    /// Reads the metadata snapshot, which is taken for that. `None` when it cannot be taken, or was released by another
    /// program during the read.
    fn read_snapshot<T>(&self, read: Question<'_, T>) -> Result<Option<ThinResult<T>>, DenseReason> {
        let state = self.state(Commit::No)?;
        if self.no_snapshots || state.mode == Mode::ReadOnly {
            return Ok(None);
        }
        let snapshot = match MetadataSnapshot::reserve(&self.control, self.id) {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => return Ok(None),
            Err(error) => {
                debug!("{}: cannot take its metadata snapshot: {}", state.name, plain(&error));
                return Ok(None);
            }
        };
        let result = state.open_metadata().and_then(|reader| {
            let metadata = Metadata::open(reader, snapshot.root())?;
            Ok(read(&state, &metadata))
        });
        // If another program released the snapshot, its blocks were free and may have been written during the read.
        let is_held = self.state(Commit::No)?.held_root == Some(snapshot.root());
        if is_held { Ok(Some(result?)) } else { Ok(None) }
    }

    /// The state of the pool now.
    fn state(&self, commit: Commit) -> Result<LivePoolState, DenseReason> {
        let suspended = || DenseReason::NotNow("its pool is suspended".into());
        let not_understood =
            |what: &'static str, text: &str| DenseReason::NotUnderstood { what: what.into(), text: text.to_owned() };
        let table =
            self.control.table(self.id).map_err(|error| DenseReason::cannot("read its pool's table", &error))?;
        if table.suspended {
            return Err(suspended());
        }
        let (name, params) = only_target(table)?;
        let table = params::pool_table(&params).ok_or_else(|| not_understood("its pool's table is", &params))?;
        let status = self.control.status(self.id, commit);
        let status = status.map_err(|error| DenseReason::cannot("read its pool's status", &error))?;
        // A suspended pool reports its status without a commit.
        if status.suspended {
            return Err(suspended());
        }
        let (_, status) = only_target(status)?;
        let status = params::pool_status(&status)
            .map_err(|status| DenseReason::State(format!("its pool's status is: {status}").into()))?;
        if status.needs_check {
            return Err(DenseReason::Damaged("its pool's metadata needs a check (thin_check)".into()));
        }
        Ok(LivePoolState { name, params, table, held_root: status.held_root, mode: status.mode })
    }
}

fn too_fast() -> DenseReason {
    DenseReason::NotNow("its pool commits faster than its metadata can be read".into())
}

/// The name of a pool, and the text of its only target.
fn only_target(table: Table) -> Result<(String, String), DenseReason> {
    match <[_; 1]>::try_from(table.targets) {
        Ok([target]) if target.kind == "thin-pool" => Ok((table.name, target.params)),
        _ => Err("its pool is not a thin pool".into()),
    }
}

impl LivePoolState {
    fn open_metadata(&self) -> Result<MetadataReader, DenseReason> {
        let id = self.table.metadata;
        let failed = |error| DenseReason::cannot(format!("open the metadata device {id}"), &error);
        let (file, _) = device::open_id(id, true).map_err(failed)?;
        MetadataReader::new(file).map_err(failed)
    }

    fn read(&self, metadata: &Metadata, wanted: &Wanted) -> ThinResult<FillMap> {
        self.check(metadata, wanted)?;
        metadata.map(wanted.id, wanted.len, THREADS)
    }

    /// Checks that the metadata is of this pool, and has all that is mapped of a device.
    fn check(&self, metadata: &Metadata, wanted: &Wanted) -> ThinResult<()> {
        let superblock = metadata.superblock();
        if superblock.data_block_size != self.table.block {
            return Err(ThinError::OtherBlockSize);
        }
        if superblock.needs_check {
            return Err(ThinError::NeedsCheck);
        }
        let block = self.table.block.sectors().get();
        let mapped = metadata.details(wanted.id)?.mapped_blocks.checked_mul(block).map(Sectors::new);
        // A read-only pool does not commit, and may have become read-only in the middle of a transaction.
        if self.mode == Mode::ReadOnly && mapped != Some(wanted.mapped) {
            return Err(ThinError::Behind);
        }
        Ok(())
    }
}

/// The I/O counters of a device that had no write in flight when this was made.
struct IdleDevice {
    id: DeviceId,
    stat: StatFile,
    seen: Activity,
    counting: CompleteAccounting,
}

impl IdleDevice {
    /// `None` when a write is in flight, or it is not certain that all I/O is counted.
    fn new(id: DeviceId) -> io::Result<Option<Self>> {
        let stat = StatFile::open(id)?;
        let counting = match CompleteAccounting::of(id) {
            Ok(counting) => counting,
            Err(error) => {
                debug!("cannot use the I/O counters of the metadata device {id}: {}", plain(&error));
                return Ok(None);
            }
        };
        let seen = Activity::now(id, &stat)?;
        Ok(seen.is_idle().then_some(Self { id, stat, seen, counting }))
    }

    /// Whether no write completed since, and none is in flight now. The writes in flight are read before the counters,
    /// in the opposite order to [`IdleDevice::new`]: a write that is no longer in flight has been counted.
    fn is_still_idle(&self) -> io::Result<bool> {
        let idle = sysfs::writes_in_flight(self.id)? == 0;
        Ok(idle && self.seen.lasts(self.id, &self.stat)? && self.counting.holds())
    }
}
