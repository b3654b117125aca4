//! The features of a file system: which are understood, and why the others are refused.
//!
//! Source of the bits: e2fsprogs, `lib/ext2fs/ext2_fs.h` (`EXT2_FEATURE_*`, `EXT3_FEATURE_*`, `EXT4_FEATURE_*`).

use crate::reason::DenseReason;

const COMPAT_SPARSE_SUPER2: u32 = 0x200;
/// `dir_prealloc`, `imagic_inodes`, `has_journal`, `ext_attr`, `resize_inode`, `dir_index`, `sparse_super2`, `fast_commit`,
/// `stable_inodes`, `orphan_file`.
const COMPAT_UNDERSTOOD: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | COMPAT_SPARSE_SUPER2 | 0x400 | 0x800 | 0x1000;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_MMP: u32 = 0x100;
const INCOMPAT_FLEX_BG: u32 = 0x200;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
/// Also `filetype`, `extents`, `ea_inode`, `largedir`, `inline_data`, `encrypt`, `casefold`.
const INCOMPAT_UNDERSTOOD: u32 = INCOMPAT_META_BG
    | INCOMPAT_64BIT
    | INCOMPAT_MMP
    | INCOMPAT_FLEX_BG
    | INCOMPAT_CSUM_SEED
    | (0x2 | 0x40 | 0x400 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000);

const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_GDT_CSUM: u32 = 0x10;
const RO_COMPAT_BIGALLOC: u32 = 0x200;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const RO_COMPAT_SHARED_BLOCKS: u32 = 0x4000;
const RO_COMPAT_ORPHAN_PRESENT: u32 = 0x1_0000;
/// Also `large_file`, `huge_file`, `dir_nlink`, `extra_isize`, `quota`, `read-only`, `project`, `verity`.
const RO_COMPAT_UNDERSTOOD: u32 = RO_COMPAT_SPARSE_SUPER
    | RO_COMPAT_GDT_CSUM
    | RO_COMPAT_BIGALLOC
    | RO_COMPAT_METADATA_CSUM
    | (0x2 | 0x8 | 0x20 | 0x40 | 0x100 | 0x1000 | 0x2000 | 0x8000);

/// The three sets of features in a superblock.
#[derive(Clone, Copy)]
pub(super) struct Features {
    /// A program that does not know one of these may still write.
    pub compat: u32,
    /// A program that does not know one of these may not read.
    pub incompat: u32,
    /// A program that does not know one of these may read, and may not write.
    pub ro_compat: u32,
}

impl Features {
    /// # Errors
    /// If a feature is not understood, or is one with which the free space is not certain.
    pub(super) fn check(self) -> Result<(), DenseReason> {
        if self.incompat & INCOMPAT_JOURNAL_DEVICE != 0 {
            return Err(DenseReason::Unsupported("it is the external journal of another file system".into()));
        }
        if self.incompat & INCOMPAT_RECOVER != 0 {
            let text = "its journal is not empty: mount and unmount it once, or run e2fsck";
            return Err(DenseReason::State(text.into()));
        }
        if self.ro_compat & RO_COMPAT_ORPHAN_PRESENT != 0 {
            return Err(orphans());
        }
        if self.ro_compat & RO_COMPAT_SHARED_BLOCKS != 0 {
            return Err(DenseReason::Unsupported("its files share blocks (shared_blocks)".into()));
        }
        for (set, unknown) in [
            ("compatible", self.compat & !COMPAT_UNDERSTOOD),
            ("incompatible", self.incompat & !INCOMPAT_UNDERSTOOD),
            ("read-only compatible", self.ro_compat & !RO_COMPAT_UNDERSTOOD),
        ] {
            if unknown != 0 {
                return Err(format!("it has {set} features that are not supported: {unknown:#x}").into());
            }
        }
        Ok(())
    }

    pub(super) fn sparse_super(self) -> bool {
        self.ro_compat & RO_COMPAT_SPARSE_SUPER != 0
    }

    pub(super) fn sparse_super2(self) -> bool {
        self.compat & COMPAT_SPARSE_SUPER2 != 0
    }

    pub(super) fn meta_bg(self) -> bool {
        self.incompat & INCOMPAT_META_BG != 0
    }

    pub(super) fn has_64bit(self) -> bool {
        self.incompat & INCOMPAT_64BIT != 0
    }

    pub(super) fn mmp(self) -> bool {
        self.incompat & INCOMPAT_MMP != 0
    }

    pub(super) fn flex_bg(self) -> bool {
        self.incompat & INCOMPAT_FLEX_BG != 0
    }

    pub(super) fn csum_seed(self) -> bool {
        self.incompat & INCOMPAT_CSUM_SEED != 0
    }

    pub(super) fn gdt_csum(self) -> bool {
        self.ro_compat & RO_COMPAT_GDT_CSUM != 0
    }

    pub(super) fn bigalloc(self) -> bool {
        self.ro_compat & RO_COMPAT_BIGALLOC != 0
    }

    pub(super) fn metadata_csum(self) -> bool {
        self.ro_compat & RO_COMPAT_METADATA_CSUM != 0
    }
}

/// The reason for a file system that has orphans: files that were deleted or cut while they were open.
pub(super) fn orphans() -> DenseReason {
    let text = "it has files whose deletion is not complete: mount and unmount it once, or run e2fsck";
    DenseReason::State(text.into())
}
