//! Reads the metadata of a live pool without disturbing it.
//!
//! A transaction of the pool writes only to blocks that were free in the last committed state, so that a crash finds
//! that state whole. A tree is therefore read whole when no commit happened meanwhile. The proof is made of the metadata
//! device itself: no write is in flight at either end of the reading, its counters of writes stand still in between, and
//! the superblock is the same. (Equal superblocks alone would not do: after two commits the roots can be back in the
//! same blocks, with other leaves.) Counters can be switched off: they are used only while it is certain that they are on,
//! and where reading the superblock moves the one of reads.
//!
//! A pool that commits faster than its tree can be read is read from a metadata snapshot, which is taken for that long.
//! There is one for each pool and everybody shares it; when somebody else holds it, the quiet way is tried some more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::debug;

use super::error::{Result as ThinResult, ThinError};
use super::held::Snapshot;
use super::metadata::{Metadata, read_superblock};
use super::params::{self, Mode, PoolTable};
use super::reader::MetadataReader;
use super::turns::{self, Turns};
use super::{MetaBlock, ThinId};
use crate::error::{Error, Result, plain};
use crate::map::FillMap;
use crate::sys::device::{self, DeviceId};
use crate::sys::dm::{Commit, Control, Table};
use crate::sys::iostats::CompleteAccounting;
use crate::sys::sysfs::{self, Activity, StatFile};
use crate::units::{Bytes, Sectors};

/// Readings that are tried before the metadata snapshot is taken.
const QUIET_TRIES: usize = 3;
/// Readings that are tried when it cannot be taken.
const MORE_TRIES: usize = 8;
/// No other reading begins after this long: a large tree is not read again and again.
const PATIENCE: Duration = Duration::from_secs(1);
/// Threads of one reading. More gain nothing: a second one already reads while the first one checks.
const THREADS: usize = 2;
/// Sectors that reading a superblock takes.
const SUPERBLOCK_SECTORS: u64 = 8;

/// What readers of live pools share.
pub type Readers = turns::Pools<Wanted, ThinResult<FillMap>>;

/// A live pool.
pub struct Pool {
    control: Arc<Control>,
    id: DeviceId,
    turns: Arc<Turns<Wanted, ThinResult<FillMap>>>,
}

/// The device whose map is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Its number in the pool.
    pub id: ThinId,
    /// Its length.
    pub len: Bytes,
    /// How much of it is mapped, as the kernel says.
    pub mapped: Sectors,
}

/// What one reading gave for each device that it came to.
type Maps = Vec<ThinResult<FillMap>>;

/// Why there is no map.
#[derive(Debug)]
pub enum NoMap {
    /// The pool changes faster than it can be read, or is suspended: later, there may be one.
    NotNow(&'static str),
    /// As long as nothing changes, there is none.
    Failed(Error),
}

impl From<ThinError> for NoMap {
    fn from(error: ThinError) -> Self {
        match error {
            ThinError::Behind => Self::NotNow("its pool is read-only, and knows more than its metadata on disk"),
            error => Self::Failed(error.into()),
        }
    }
}

impl From<Error> for NoMap {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The pool as its tables and status say it is now. Looked at anew for each reading: metadata devices are swapped and
/// extended while the pool is in use.
struct Live {
    name: String,
    params: String,
    table: PoolTable,
    held_root: Option<MetaBlock>,
    mode: Mode,
}

/// One reading.
enum Reading {
    /// What it gave for the first device that was wanted, and for the others if it came to them: true maps, or true
    /// failures.
    Whole(Maps),
    /// Something was written meanwhile: whatever was read means nothing.
    Torn,
}

impl Pool {
    /// The pool `id`.
    pub fn new(control: Arc<Control>, id: DeviceId, readers: &Readers) -> Self {
        Self { control, id, turns: readers.of(id) }
    }

    /// The mapped blocks of a thin device: all those that were written to by any write that completed before this is
    /// called.
    ///
    /// # Errors
    /// When the pool has failed, wants to be checked or is suspended, when its metadata is damaged, and when it changes
    /// too fast.
    pub fn map(&self, wanted: &Wanted) -> std::result::Result<FillMap, NoMap> {
        let map = self.turns.take(*wanted, |wanted| self.maps(wanted))?;
        Ok(map.ok_or(NoMap::NotNow("its pool commits faster than its metadata can be read"))??)
    }

    /// The maps of several devices from one reading; fewer when it came to nothing.
    fn maps(&self, wanted: &[Wanted]) -> std::result::Result<Maps, NoMap> {
        if let Some(maps) = self.quietly(QUIET_TRIES, wanted)? {
            return Ok(maps);
        }
        if let Some(maps) = self.with_snapshot(wanted)? {
            return Ok(maps);
        }
        Ok(self.quietly(MORE_TRIES, wanted)?.unwrap_or_default())
    }

    /// Some readings of the last committed state; `None` when the pool committed during each.
    fn quietly(&self, tries: usize, wanted: &[Wanted]) -> std::result::Result<Option<Maps>, NoMap> {
        let start = Instant::now();
        for _ in (0..tries).take_while(|_| start.elapsed() < PATIENCE) {
            // Makes the pool commit: every completed write is on disk from here on.
            let live = self.look(Commit::Yes)?;
            match self.read_quietly(&live, wanted)? {
                Reading::Whole(maps) => return Ok(Some(maps)),
                Reading::Torn => debug!("{}: committed while its metadata was read", live.name),
            }
        }
        Ok(None)
    }

    fn read_quietly(&self, live: &Live, wanted: &[Wanted]) -> Result<Reading> {
        let unreadable = |error| Error::failed("cannot read the I/O counters of the metadata device").because(error);
        let reader = live.open_metadata()?;
        let Some(before) = Still::begin(live.table.metadata).map_err(unreadable)? else {
            return Ok(Reading::Torn);
        };
        let reads_before = before.stat.sectors_read().map_err(unreadable)?;
        let metadata = match Metadata::open(reader, MetaBlock::SUPERBLOCK) {
            Ok(metadata) => metadata,
            // A superblock that is read while it is written is no sign of damage.
            Err(error) => {
                let still = before.lasts().map_err(unreadable)?;
                return Ok(if still { Reading::Whole(vec![Err(error)]) } else { Reading::Torn });
            }
        };
        if before.stat.sectors_read().map_err(unreadable)?.get() < reads_before.get() + SUPERBLOCK_SECTORS {
            debug!("{}: its metadata device counts nothing", live.name);
            return Ok(Reading::Torn);
        }
        let maps = wanted.iter().map(|wanted| live.read(&metadata, wanted)).collect();
        let same = read_superblock(metadata.reader(), MetaBlock::SUPERBLOCK)
            .is_ok_and(|(_, raw)| *raw == *metadata.raw_superblock());
        // A pool that was suspended in the very moment of its status did not commit for it.
        let whole = same && before.lasts().map_err(unreadable)? && self.is_still(live);
        Ok(if whole { Reading::Whole(maps) } else { Reading::Torn })
    }

    /// Whether the pool is what it was, and not suspended.
    fn is_still(&self, live: &Live) -> bool {
        let table = self.control.table(self.id);
        table.is_ok_and(|table| !table.suspended && only_target(table).is_ok_and(|(_, params)| params == live.params))
    }

    /// A reading of the metadata snapshot, taken for it; `None` when it cannot be had, or not be kept.
    fn with_snapshot(&self, wanted: &[Wanted]) -> std::result::Result<Option<Maps>, NoMap> {
        let live = self.look(Commit::No)?;
        if live.mode == Mode::ReadOnly {
            return Ok(None);
        }
        let snapshot = match Snapshot::reserve(&self.control, self.id) {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => return Ok(None),
            Err(error) => {
                debug!("{}: no metadata snapshot: {}", live.name, plain(&error));
                return Ok(None);
            }
        };
        let maps = live.open_metadata().map_err(NoMap::from).and_then(|reader| {
            let metadata = Metadata::open(reader, snapshot.root())?;
            Ok(wanted.iter().map(|wanted| live.read(&metadata, wanted)).collect())
        });
        // Whoever released our snapshot made its blocks free, and what was read of them worthless.
        let ours = self.look(Commit::No)?.held_root == Some(snapshot.root());
        if ours { Ok(Some(maps?)) } else { Ok(None) }
    }

    /// The pool now.
    fn look(&self, commit: Commit) -> std::result::Result<Live, NoMap> {
        const SUSPENDED: NoMap = NoMap::NotNow("its pool is suspended");
        let failed = |what: &str, error| Error::failed(what).because(error);
        let table = self.control.table(self.id).map_err(|error| failed("cannot read its pool's table", error))?;
        if table.suspended {
            return Err(SUSPENDED);
        }
        let (name, params) = only_target(table)?;
        let table = params::pool_table(&params)
            .ok_or_else(|| Error::failed(format!("its pool's table is not understood: {params}")))?;
        let status =
            self.control.status(self.id, commit).map_err(|error| failed("cannot read its pool's status", error))?;
        // A suspended pool answers without a commit.
        if status.suspended {
            return Err(SUSPENDED);
        }
        let (_, status) = only_target(status)?;
        let status =
            params::pool_status(&status).map_err(|status| Error::failed(format!("its pool's status is: {status}")))?;
        if status.needs_check {
            return Err(Error::failed("its pool's metadata needs a check (thin_check)").into());
        }
        Ok(Live { name, params, table, held_root: status.held_root, mode: status.mode })
    }
}

/// The name of a pool, and the text of its one target.
fn only_target(table: Table) -> Result<(String, String)> {
    match <[_; 1]>::try_from(table.targets) {
        Ok([target]) if target.kind == "thin-pool" => Ok((table.name, target.params)),
        _ => Err(Error::failed("its pool is not a thin pool")),
    }
}

impl Live {
    fn open_metadata(&self) -> Result<MetadataReader> {
        let id = self.table.metadata;
        let failed = |error| Error::failed(format!("cannot open the metadata device {id}")).because(error);
        let (file, _) = device::open_id(id, true).map_err(failed)?;
        MetadataReader::new(file).map_err(failed)
    }

    fn read(&self, metadata: &Metadata, wanted: &Wanted) -> ThinResult<FillMap> {
        let superblock = metadata.superblock();
        if superblock.data_block_size != self.table.block {
            return Err(ThinError::OtherBlockSize);
        }
        if superblock.needs_check {
            return Err(ThinError::NeedsCheck);
        }
        let block = self.table.block.sectors().get();
        let mapped = metadata.details(wanted.id)?.mapped_blocks.checked_mul(block).map(Sectors::new);
        // Such a pool does not commit, and may have stopped in the middle of a transaction.
        if self.mode == Mode::ReadOnly && mapped != Some(wanted.mapped) {
            return Err(ThinError::Behind);
        }
        metadata.map(wanted.id, wanted.len, THREADS)
    }
}

/// A device that nobody was writing to, at a moment, and that counts everything since then.
struct Still {
    id: DeviceId,
    stat: StatFile,
    seen: Activity,
    counting: CompleteAccounting,
}

impl Still {
    /// `None` when a write is under way, or not everything may be counted.
    fn begin(id: DeviceId) -> std::io::Result<Option<Self>> {
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

    /// Whether nobody wrote since, and nobody does now. The writes in flight before the counters, in the opposite order: a
    /// write that is not in flight any more is counted.
    fn lasts(&self) -> std::io::Result<bool> {
        let idle = sysfs::writes_in_flight(self.id)? == 0;
        Ok(idle && self.seen.lasts(self.id, &self.stat)? && self.counting.holds())
    }
}
