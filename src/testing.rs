//! The parts that the tests, the benchmarks and the fuzz targets of this repository use. They are no interface for other
//! programs. All else is private, so that the compiler finds code that nothing uses.

#![allow(missing_docs, reason = "each item is documented where it is defined")]

pub mod deadline {
    pub use crate::deadline::REQUEST;
    pub use crate::deadline::within;
}
pub mod export {
    pub use crate::export::{Export, NbdExportFile, VolumeExport, Writer, Zeroed, open};
}
pub mod fs {
    pub mod change {
        pub use crate::fs::change::records;
    }
}
pub mod filesystem {
    pub use crate::filesystem::memory::MemoryDevice;
    pub use crate::filesystem::{ReadBytes, btrfs, detect, ext, partitions, swap, xfs};
}
pub mod fuse {
    pub use crate::fuse::SESSION_THREADS;
}
pub mod handle {
    pub use crate::handle::{Handle, HolesNow, MapCache, StackState, Walk};
}
pub mod map {
    pub use crate::map::{ChangeMap, Extent, ExtentKind, FillMap, HoleMap, view};
}
pub mod mount {
    pub use crate::mount::{argv, options, record, status};
    pub use crate::sys::mountinfo;
    pub mod session {
        pub use crate::mount::session::CLONE_DESCRIPTOR;
    }
}
pub mod qcow2 {
    pub use crate::qcow2::{Backing, BackingFormat, Builder, ClusterSize, Content, Error, Layout, Part};
}
pub mod reason {
    pub use crate::reason::DenseReason;
}
pub mod report {
    pub use crate::report::{status, status_json};
}
pub mod source {
    pub use crate::source::{BlockDevice, Context, Stack, changes};
    pub mod dm {
        pub use crate::source::dm::{exceptions, params};
    }
    pub mod md {
        pub use crate::source::md::array;
    }
    pub mod nbd {
        pub use crate::source::nbd::{Client, ExportWriter, FlushBeforeStatus, NbdExport, Timeouts, Uri, layer};
        pub use crate::source::nbd::{frame, map, proto, reply};
    }
    pub mod scsi {
        pub use crate::source::scsi::pages;
    }
    pub mod thin {
        pub use crate::source::thin::{DataBlockSize, MetaBlock, RawBlock, ThinId};
        pub use crate::source::thin::{changes, error, lookup, metadata, node, offline, params, reader, record};
    }
}
pub mod spec {
    pub use crate::spec::{Spec, Tag};
}
pub mod sys {
    pub use crate::sys::{boot, buffer, device, dm, sysfs};
}
pub mod units {
    pub use crate::units::{Bytes, Sectors};
}
pub mod verify {
    pub use crate::verify::{CopyReport, Findings, HolesReport, Progress, Ranges, copy, holes, random_seed, sample};
}
