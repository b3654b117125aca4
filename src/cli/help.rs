//! The text of `blkholefs --help`.

/// Printed by `--help`. No line is longer than a terminal of 80 columns.
pub const HELP: &str = "\
Shows block devices as regular files whose holes are real.

Usage:
  blkholefs mount [-f|--foreground] [-v] [-o OPTIONS] SPEC DIR
  blkholefs umount [-f] [-l] [-v] DIR
  blkholefs map [--json|--totals|--picture [--ascii]|--svg FILE|--format FORM]
                [--since OLDER] [--offset N] [--length N] [-o OPTIONS] DEVICE...
  blkholefs info [--json] [-o OPTIONS] DEVICE...
  blkholefs verify [--sample N [--seed S] | --against FILE] [-o OPTIONS] DEVICE
  blkholefs status [--json] [DIR...]
  blkholefs demo

Commands:
  mount    shows SPEC (a device, image, NBD URI or directory of devices) at DIR
  umount   unmounts DIR and waits until the daemon has closed the device
  map      prints the data and holes of devices, without a mount
  info     prints the layers of devices, and where their holes come from
  verify   compares the holes of a device with zeros, or a copy with the device
  status   prints the mounts of this machine, and how their daemons do
  demo     mounts and copies a sparse image that it makes, and removes it all

Options of mount and umount:
  -v                      prints what is done

Options of mount:
  -f, --foreground        serves in this process, and logs to standard error
  -o OPTIONS              options between commas; see mount.blkholefs(8)

Options of umount:
  -f                      aborts requests that the daemon has not answered
  -l                      detaches the mount although it is in use

Options of map:
  --json                  prints JSON: as qemu-img map; with --since, an
                          identity and extents; for several devices, an array
  --totals                prints only the sums
  --picture               draws the device as a grid of blocks, as wide as the
                          terminal
      --ascii             with plain ASCII characters, without colours
  --svg FILE              draws it into FILE, for documents; - is the standard
                          output
  --format FORM           prints a map that another program reads: borg, bmap
                          (bmaptool), ddrescue, csi
  --since OLDER           prints what changed in DEVICE since OLDER, an older
                          snapshot of it: a device; with thin_metadata, the id
                          of a volume; with an NBD URI, the name of a dirty
                          bitmap
  --offset N, --length N  limit the range, in bytes

Options of info and status:
  --json                  prints JSON

Options of verify:
  --sample N              reads N pieces of holes, which are chosen at random,
                          and prints the seed
  --seed S                chooses the same pieces as the run that printed this
                          seed
  --against FILE          compares FILE, a copy of DEVICE, with it; what is a
                          hole in both is not read

Options of map, info and verify:
  -o thin_metadata=META   DEVICE is the data of a thin pool that is not active
      --volume ID         the volume of that pool
  -o nbd=URI              the export that the NBD device of the kernel is
                          connected to
  -o used                 the view of the used space, instead of the exact file
  -o compact              the compact image, instead of the exact file

Options of all commands:
  -h, --help              prints this text
  -V, --version           prints the version

See blkholefs(8) and mount.blkholefs(8).
";

#[cfg(test)]
mod tests {
    #[test]
    fn no_line_is_wider_than_a_terminal() {
        let wide: Vec<_> = super::HELP.lines().filter(|line| line.len() > 80).collect();
        assert!(wide.is_empty(), "{wide:?}");
    }
}
