//! Volumes that LVM made: linear, striped and thin, with LVM's own names.

use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use blkholefs::testing::map::{ExtentKind, HoleMap as _};
use blkholefs::testing::source::Context;
use blkholefs::testing::source::changes::{self, IdentityValue};
use blkholefs::testing::spec::Spec;
use blkholefs::testing::sys::device::DeviceId;
use blkholefs::testing::units::Bytes;

use crate::common::check::{assert_map, check, map_of};
use crate::common::image::{Image, discard, write};
use crate::common::loop_device::Loop;
use crate::common::mount::Mount;
use crate::common::{GIB, MIB, run};

/// LVM without udev, backups, archives and a devices file.
const CONFIGURATION: &str = "
activation { udev_sync=0 udev_rules=0 monitoring=0 }
devices { use_devicesfile=0 scan=[\"/dev\"] obtain_device_list_from_udev=0 }
backup { backup=0 archive=0 }
global { event_activation=0 }
";

/// A volume group on one loop device.
pub struct Group {
    name: String,
    configuration: tempfile::TempDir,
    _device: Loop,
    _image: Image,
}

impl Group {
    pub fn new(name: &str) -> Self {
        let configuration = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(configuration.path().join("lvm.conf"), CONFIGURATION)
            .expect("the temporary directory is writable");
        let image = Image::new(GIB);
        let device = Loop::new(image.path());
        let group = Self { name: name.to_owned(), configuration, _device: device, _image: image };
        group.lvm(&["vgcreate", "--quiet", name, group._device.path().to_str().expect("text")]);
        group
    }

    pub fn lvm(&self, arguments: &[&str]) {
        let configuration = format!("LVM_SYSTEM_DIR={}", self.configuration.path().display());
        run("env", [&[configuration.as_str(), "LVM_SUPPRESS_FD_WARNINGS=1"], arguments].concat());
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory with the configuration of LVM.
    pub fn configuration(&self) -> &Path {
        self.configuration.path()
    }

    pub fn volume(&self, name: &str) -> PathBuf {
        Path::new("/dev").join(&self.name).join(name)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // Every mount is gone by now, so no volume is open.
            self.lvm(&["vgremove", "--quiet", "--force", "--yes", &self.name]);
        }
    }
}

/// udev's link leads to the kernel's name, and mount(8) calls the device by its name in /dev/mapper.
#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn a_tag_of_a_logical_volume_is_its_path_in_dev_mapper() {
    let group = Group::new("testtag");
    group.lvm(&["lvcreate", "--quiet", "-L", "4M", "-n", "data", "testtag"]);
    let number = std::fs::metadata(group.volume("data")).expect("a volume").rdev();
    let kernel = Path::new("/dev").join(format!("dm-{}", DeviceId::from_dev(number).minor));
    assert!(kernel.exists(), "{}", kernel.display());
    std::fs::create_dir_all("/dev/disk/by-id").expect("/dev is that of this kernel");
    let link = Path::new("/dev/disk/by-id/dm-name-testtag-data");
    symlink(kernel, link).expect("there is no such link");
    let spec = Spec::parse(OsStr::new("ID=dm-name-testtag-data")).expect("the link is there");
    assert_eq!(spec.typed(), "/dev/mapper/testtag-data");
    assert_eq!(spec.path(), Some(Path::new("/dev/mapper/testtag-data")));
    std::fs::remove_file(link).expect("it is ours");
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn thin_logical_volumes_have_their_unmapped_blocks_as_holes() {
    let group = Group::new("testthin");
    let name = group.name.as_str();
    group.lvm(&["lvcreate", "--quiet", "-T", "-L", "256M", "-c", "64k", &format!("{name}/pool")]);
    group.lvm(&["lvcreate", "--quiet", "-T", "-V", "4G", "-n", "data", &format!("{name}/pool")]);
    let data = group.volume("data");
    write(&data, GIB..GIB + MIB);
    let mount = Mount::new(&data);
    assert_map(mount.file(), &map_of(4 * GIB, &[GIB..GIB + MIB]));

    group.lvm(&["lvcreate", "--quiet", "-s", "-n", "snap", "-K", &format!("{name}/data")]);
    group.lvm(&["lvchange", "--quiet", "-ay", "-K", &format!("{name}/snap")]);
    write(&data, 2 * GIB..2 * GIB + 4096);
    let snap = Mount::new(&group.volume("snap"));
    assert_map(snap.file(), &map_of(4 * GIB, &[GIB..GIB + MIB]));
    assert_map(mount.file(), &map_of(4 * GIB, &[GIB..GIB + MIB, 2 * GIB..2 * GIB + 65536]));
    drop(snap);
    group.lvm(&["lvremove", "--quiet", "--yes", &format!("{name}/snap")]);

    // LVM moves the metadata to a larger device; the map follows.
    group.lvm(&["lvextend", "--quiet", "--poolmetadatasize", "+4M", &format!("{name}/pool")]);
    group.lvm(&["lvextend", "--quiet", "-L", "5G", &format!("{name}/data")]);
    write(&data, 5 * GIB - 4096..5 * GIB);
    let expected = [GIB..GIB + MIB, 2 * GIB..2 * GIB + 65536, 5 * GIB - 65536..5 * GIB];
    assert_map(mount.file(), &map_of(5 * GIB, &expected));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn thin_logical_volumes_are_compared_when_both_are_active() {
    let group = Group::new("testsince");
    let name = group.name.as_str();
    group.lvm(&["lvcreate", "--quiet", "-T", "-L", "256M", "-c", "64k", &format!("{name}/pool")]);
    group.lvm(&["lvcreate", "--quiet", "-T", "-V", "4G", "-n", "data", &format!("{name}/pool")]);
    let data = group.volume("data");
    write(&data, GIB..GIB + MIB);
    group.lvm(&["lvcreate", "--quiet", "-s", "-n", "snap", &format!("{name}/data")]);
    let snap = group.volume("snap");
    // LVM does not activate a snapshot unless it is asked with -K.
    let error = changes::open(&snap).expect_err("it is not active");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("lvchange -ay -K")), "{error}");
    group.lvm(&["lvchange", "--quiet", "-ay", "-K", &format!("{name}/snap")]);
    write(&data, 2 * GIB..2 * GIB + 4096);
    discard(&data, GIB..GIB + 65536);
    let [older, newer] = [&snap, &data].map(|path| changes::open(path).expect("it is active"));
    let context = Context { no_metadata_snapshots: true, ..Context::default() };
    let found = changes::between(&older, &newer, &context).expect("two volumes of one pool");
    let kind_at = |at: u64| found.map.extent_at(Bytes::new(at)).kind;
    assert_eq!(kind_at(2 * GIB), ExtentKind::Data);
    assert_eq!(kind_at(GIB), ExtentKind::Hole);
    assert_eq!([0, GIB + 65536, 2 * GIB + 65536].map(kind_at), [ExtentKind::Unchanged; 3]);
    let field = |name: &str| found.identity.fields.iter().find(|(field, _)| *field == name).map(|(_, value)| value);
    let pool = field("pool");
    assert!(matches!(pool, Some(IdentityValue::Text(uuid)) if uuid.starts_with("LVM-")), "{pool:?}");
    assert_eq!(field("older-created"), Some(&IdentityValue::Number(1)), "the pool's first snapshot");
    assert_eq!(field("newer-created"), Some(&IdentityValue::Number(0)));
    assert_eq!(field("size"), Some(&IdentityValue::Number(4 * GIB)));
}

#[test]
#[ignore = "needs a kernel with device-mapper: run tests/run"]
fn linear_logical_volumes_have_the_holes_of_their_segments() {
    let group = Group::new("testplain");
    let name = group.name.as_str();
    group.lvm(&["lvcreate", "--quiet", "-Zn", "-L", "32M", "-n", "first", name]);
    group.lvm(&["lvcreate", "--quiet", "-Zn", "-L", "32M", "-n", "second", name]);
    // The second segment of the first volume lies behind the second volume.
    group.lvm(&["lvextend", "--quiet", "-L", "64M", &format!("{name}/first")]);
    write(&group.volume("first"), 40 * MIB..41 * MIB);
    write(&group.volume("second"), 0..MIB);
    let mount = Mount::new(&Path::new("/dev").join(name));
    let (first, second) = (mount.directory().join("first"), mount.directory().join("second"));
    assert_map(&first, &map_of(64 * MIB, &[40 * MIB..41 * MIB]));
    assert_map(&second, &map_of(32 * MIB, &[0..MIB]));
    check(&first, &group.volume("first"));
    // The idle mount holds no volume open, so LVM can remove one.
    group.lvm(&["lvremove", "--quiet", "--yes", &format!("{name}/first")]);
    check(&second, &group.volume("second"));
}
