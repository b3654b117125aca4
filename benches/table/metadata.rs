//! Metadata of thin pools, made by `thin_restore`.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::common::random::Random;
use crate::common::run;
use crate::thin_image::{NODE, get, put, stamp};

/// Bytes of a thin block.
pub const BLOCK: u64 = 64 << 10;

/// Which blocks of a volume are mapped.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// All.
    Contiguous,
    /// Every other one.
    Alternating,
    /// 30 % of them, in runs of 8 on average.
    Random,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Contiguous => "contiguous",
            Self::Alternating => "alternating",
            Self::Random => "30 % random",
        })
    }
}

/// The metadata of a pool with one volume, number 1; gone with this value.
pub struct Metadata {
    /// The image.
    pub image: tempfile::TempPath,
    /// The data, a sparse file that holds nothing.
    pub data: tempfile::TempPath,
    /// Blocks up to the last mapped one.
    pub blocks: u64,
    /// Mapped blocks.
    pub mappings: u64,
}

impl Metadata {
    /// Writes the metadata of a volume of `mappings` blocks to a new file in `directory`.
    pub fn new(directory: &Path, layout: Layout, mappings: u64) -> Self {
        let text = new_file(directory, 0);
        let blocks = write_text(&text, layout, mappings);
        // A leaf holds at most 252 mappings, and `thin_restore` leaves some of them half empty.
        let image = new_file(directory, mappings * 64 + (16 << 20));
        run("thin_restore", ["--input".as_ref(), text.as_os_str(), "--output".as_ref(), image.as_os_str()]);
        Self { image, data: new_file(directory, mappings * BLOCK), blocks, mappings }
    }

    /// The same image in another directory.
    pub fn copied_to(&self, directory: &Path) -> tempfile::TempPath {
        let copy = new_file(directory, 0);
        run("cp", ["--sparse=never".as_ref(), self.image.as_os_str(), copy.as_os_str()]);
        run("sync", [&copy]);
        copy
    }

    /// The same image with `count` volumes, from 1 on, which share all of their mappings: snapshots not written to.
    ///
    /// What counts the references of blocks is left as it is; only tools that write metadata look at that.
    pub fn snapshots(&self, directory: &Path, count: u64) -> tempfile::TempPath {
        let copy = self.copied_to(directory);
        let file = File::options().read(true).write(true).open(&copy).expect("our own file");
        let read = |block: u64| {
            let mut bytes = vec![0; 4096];
            file.read_exact_at(&mut bytes, block * 4096).expect("a block");
            bytes
        };
        let superblock = read(0);
        // Where the superblock has the roots of the trees of volumes and of their details, and the sizes of values.
        for (root, value) in [(320, 8), (328, 24)] {
            let location = get(&superblock, root, 8);
            let mut leaf = read(location);
            let values = 32 + 8 * get(&leaf, 20, 4) as usize;
            put(&mut leaf, 16, count, 4);
            for index in 0..count as usize {
                put(&mut leaf, 32 + 8 * index, index as u64 + 1, 8);
                leaf.copy_within(values..values + value, values + value * index);
            }
            stamp(&mut leaf, 0, NODE);
            file.write_all_at(&leaf, location * 4096).expect("our own file");
        }
        copy
    }

    /// The option that names the image.
    pub fn option(&self, image: &Path) -> String {
        format!("thin_metadata={}", image.display())
    }
}

fn new_file(directory: &Path, size: u64) -> tempfile::TempPath {
    let file = tempfile::NamedTempFile::with_prefix_in("thin-", directory).expect("a new file");
    file.as_file().set_len(size).expect("a sparse file");
    file.into_temp_path()
}

/// Writes what `thin_restore` reads, and answers how many blocks the volume has.
fn write_text(path: &Path, layout: Layout, mappings: u64) -> u64 {
    let mut out = BufWriter::new(File::create(path).expect("our own file"));
    let mut put = |text: String| out.write_all(text.as_bytes()).expect("room for the text");
    put(format!(
        "<superblock uuid=\"\" time=\"0\" transaction=\"1\" version=\"2\" data_block_size=\"{}\" \
         nr_data_blocks=\"{mappings}\">\n<device dev_id=\"1\" mapped_blocks=\"{mappings}\" transaction=\"0\" \
         creation_time=\"0\" snap_time=\"0\">\n",
        BLOCK / 512
    ));
    let mut random = Random::new(1);
    let (mut origin, mut data) = (0, 0);
    while data < mappings {
        let (gap, run) = match layout {
            Layout::Contiguous => (0, 4096),
            Layout::Alternating => (1, 1),
            Layout::Random => (random.within(1..38), random.within(1..16)),
        };
        let run = run.min(mappings - data);
        origin += gap;
        put(format!("<range_mapping origin_begin=\"{origin}\" data_begin=\"{data}\" length=\"{run}\" time=\"0\"/>\n"));
        (origin, data) = (origin + run, data + run);
    }
    put("</device>\n</superblock>\n".to_owned());
    out.flush().expect("room for the text");
    origin
}

/// A directory in memory, if there is one with room; else one on disk.
pub fn in_memory(otherwise: &Path) -> PathBuf {
    let memory = Path::new("/dev/shm");
    if fs::metadata(memory).is_ok_and(|found| found.is_dir()) { memory.to_owned() } else { otherwise.to_owned() }
}
