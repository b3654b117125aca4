//! A SPEC that is a tag, such as `UUID=...`: udev's links name the device.

use std::fs;

use crate::bench::{Bench, Ran};
use crate::common::needs;

/// Replaces /dev in a private mount namespace by a copy of it, with links as udev makes them.
const LINKS: &str = r#"
mkdir dev
mount -t tmpfs none dev
cp -ax /dev/. dev
mkdir -p dev/disk
for directory in uuid label partuuid partlabel id; do mkdir dev/disk/by-$directory; done
ln -s "$DEV" dev/disk/by-uuid/3255683f-53a2-4fdf-91cf-b4c1041e2a62
ln -s "$DEV" 'dev/disk/by-label/my\x20disk\x2f1'
ln -s "$DEV" dev/disk/by-partuuid/ec6bfb77-01
ln -s "$DEV" dev/disk/by-partlabel/EFI
ln -s "$DEV" dev/disk/by-id/wwn-0x5000
mount --bind dev /dev
"#;

impl Bench {
    fn with_links(&self, script: &str) -> Ran {
        let ran = self.script("", &[LINKS, script, "\numount /dev dev\nrmdir dev\n"].concat());
        self.assert_nothing_left();
        ran
    }
}

/// The source of the mount is the device, as if mount(8) had run the helper.
#[test]
fn every_kind_of_tag_names_the_device() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.with_links(
        r#"
        for spec in UUID=3255683f-53a2-4fdf-91cf-b4c1041e2a62 'UUID="3255683f-53a2-4fdf-91cf-b4c1041e2a62"' \
            'LABEL=my disk/1' "LABEL='my disk/1'" PARTUUID=ec6bfb77-01 PARTLABEL=EFI ID=wwn-0x5000; do
            bin/mount.blkholefs "$spec" mnt -o ro
            [ "$(findmnt -rno SOURCE mnt)" = "$DEV" ] || echo "$spec: $(findmnt -rno SOURCE mnt)"
            [ "$(ls mnt)" = "$(basename "$DEV")" ] || ls mnt
            bin/umount.blkholefs "$spec"
            bin/blkholefs mount "$spec" mnt
            bin/blkholefs umount "$spec"
            for command in map info verify; do
                bin/blkholefs $command "$spec" >by-tag
                bin/blkholefs $command "$DEV" | cmp - by-tag
            done
        done
        "#,
    );
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("", ""));
}

#[test]
fn a_tag_that_no_device_has_is_an_error_with_a_hint() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.with_links(
        r#"
        try() { "$@" || echo $?; }
        try bin/mount.blkholefs UUID=none mnt
        try bin/blkholefs map UUID=3255683F-53A2-4FDF-91CF-B4C1041E2A62
        try bin/umount.blkholefs LABEL=none
        try bin/blkholefs info LABEL=
        bin/mount.blkholefs UUID=none mnt -o nofail
        ! mountpoint -q mnt
        "#,
    );
    assert_eq!(ran.out, "32\n32\n32\n1\n");
    let expected = [
        "mount.blkholefs: UUID=none: no device has this tag",
        "there is no /dev/disk/by-uuid/none; lsblk -o +UUID,LABEL shows the tags",
        "blkholefs: UUID=3255683F-53A2-4FDF-91CF-B4C1041E2A62: no device has this tag",
        "there is /dev/disk/by-uuid/3255683f-53a2-4fdf-91cf-b4c1041e2a62: tags are compared as text",
        "umount.blkholefs: LABEL=none: no device has this tag",
        "there is no /dev/disk/by-label/none; lsblk -o +UUID,LABEL shows the tags",
        "blkholefs: LABEL=: the value is missing",
    ];
    assert_eq!(ran.err.lines().collect::<Vec<_>>(), expected);
}

/// The label of a disk from elsewhere may be any text. A link may lead to nothing for a moment, when a device is unplugged.
#[test]
fn a_tag_leads_to_a_block_device_or_nowhere() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.with_links(
        r#"
        cd dev/disk/by-label
        ln -s /dev directory
        touch "$OLDPWD/file"
        ln -s "$OLDPWD/file" file
        ln -s /dev/null null
        ln -s /dev/gone gone
        ln -s loop loop
        cd "$OLDPWD"
        for value in .. . directory file null gone loop; do
            bin/mount.blkholefs "LABEL=$value" mnt || echo $?
            mountpoint -q mnt && echo "$value: mounted"
        done
        "#,
    );
    assert_eq!(ran.out, "32\n".repeat(7));
    let lines: Vec<_> = ran.err.lines().collect();
    let no_device = "this tag does not lead to a block device";
    assert_eq!(lines[0], format!("mount.blkholefs: LABEL=..: {no_device}"));
    assert_eq!(lines[1], "/dev/disk/by-label/.. leads to /dev/disk");
    for (line, value) in [2, 4, 6, 8].into_iter().zip([".", "directory", "file", "null"]) {
        assert_eq!(lines[line], format!("mount.blkholefs: LABEL={value}: {no_device}"));
    }
    assert_eq!(
        lines[10..12],
        [
            "mount.blkholefs: LABEL=gone: no device has this tag",
            "/dev/disk/by-label/gone leads to /dev/gone, which is gone",
        ]
    );
    assert!(lines[12].ends_with("cannot follow: Too many levels of symbolic links") && lines.len() == 13, "{lines:?}");
}

#[test]
fn without_udev_a_sentence_says_so() {
    needs!(root, programs["unshare", "findmnt", "mount", "umount"]);
    let bench = Bench::new();
    let ran = bench.with_links("rm -r dev/disk; bin/mount.blkholefs UUID=x mnt || echo $?");
    assert_eq!(ran.out, "32\n");
    let expected = "mount.blkholefs: UUID=x: there is no /dev/disk, in which udev makes links for tags\n\
                    name the device by its path; blkid(8) shows the tags of devices\n";
    assert_eq!(ran.err, expected);
}

/// A file whose name looks like a tag is named by a path.
#[test]
fn a_file_that_is_called_like_a_tag_is_a_path() {
    needs!(root);
    let bench = Bench::new();
    fs::copy(bench.image.path(), bench.path("LABEL=x")).unwrap();
    bench.run("mount.blkholefs", ["./LABEL=x", "mnt"]).succeeds();
    assert!(bench.mnt().join("LABEL=x").is_file());
    bench.run("umount.blkholefs", ["mnt"]).succeeds();
    bench.run("mount.blkholefs", ["LABEL=x", "mnt"]).fails(32, "LABEL=x: ");
}
