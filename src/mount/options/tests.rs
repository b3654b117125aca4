use super::*;

fn parsed(list: &str) -> MountOptions {
    parse(OsStr::new(list), Unknown::Refused).unwrap_or_else(|error| panic!("{list}: {error}"))
}

fn refused(list: &str) -> (String, Option<String>) {
    let error = parse(OsStr::new(list), Unknown::Refused).expect_err(list);
    assert_eq!(error.exit_code(), 1, "{list}");
    (error.to_string(), error.hint_text().map(str::to_owned))
}

#[test]
fn every_flag_word_sets_or_clears_its_flag() {
    let default = MountOptions::default().flags;
    for (name, set, clear) in words::FLAGS {
        let flags = parsed(name).flags;
        assert_eq!(flags, (default | *set).difference(*clear), "{name}");
        assert!(flags.contains(MsFlags::MS_RDONLY), "{name}: never writable");
    }
    assert_eq!(parsed("exec,suid,dev").flags, MsFlags::MS_RDONLY);
    assert_eq!(parsed("suid,nosuid").flags, default, "the last word wins");
    assert_eq!(parsed("nosymfollow").flags.bits() & 256, 256);
}

#[test]
fn words_for_others_change_nothing() {
    for word in [
        "",
        ",",
        ",,,",
        "defaults",
        "auto",
        "noauto",
        "user",
        "user=alice",
        "nouser",
        "users",
        "nousers",
        "owner",
        "noowner",
        "group",
        "nogroup",
        "_netdev",
        "nonempty",
        "default_permissions",
        "fsname=other",
        "subtype=other",
        "comment=hi",
        "helper=blkholefs",
        "uhelper=udisks2",
        "x-systemd.requires=a.service",
        "x-systemd.automount",
        "X-foo",
        "rw",
    ] {
        assert_eq!(parsed(word), MountOptions::default(), "{word:?}");
    }
}

/// The lists that mount(8) of util-linux 2.38.1 was seen to pass.
#[test]
fn lists_that_mount_passes() {
    assert_eq!(parsed("rw"), MountOptions::default());
    let odd = parsed("rw,nosuid,nodev,mode=0440,user,nofail,_netdev,exec");
    assert_eq!(odd.mode, Some(0o440));
    assert_eq!(odd.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
    assert_eq!(odd.warnings, [""; 0], "rw comes first from mount(8) itself");
    let nofail = MountOptions { nofail: true, ..MountOptions::default() };
    assert_eq!(parsed("ro,noexec,nosuid,nodev,user,nofail"), nofail);
    assert!(parsed("rw,allow_other,").allow_other, "a trailing comma is left where a word was taken out");
    assert_eq!(parsed("ro,rw").warnings.len(), 1);
}

#[test]
fn our_words() {
    assert!(parsed("allow_other").allow_other);
    assert!(parsed("allow-other").allow_other);
    assert!(parsed("direct_io").direct_io);
    assert_eq!(parsed("uid=0,gid=4294967294").uid, Some(0));
    assert_eq!(parsed("uid=0,gid=4294967294").gid, Some(u32::MAX - 1));
    assert_eq!(parsed("mode=444,umask=0027").mode, Some(0o444));
    assert_eq!(parsed("mode=444,umask=0027").umask, Some(0o27));
    assert_eq!(parsed("max_read=128K").max_read, Some(Bytes::new(131_072)));
    assert_eq!(parsed("map_cache=0").map_cache, Some(Bytes::ZERO));
    assert_eq!(parsed("map_cache=16M").map_cache, Some(Bytes::new(16 << 20)));
    assert_eq!(parsed("thin_metadata=/dev/vg/meta=1").thin_metadata, Some("/dev/vg/meta=1".into()));
    assert_eq!(parsed("nbd=nbd://host/x").nbd.as_deref(), Some("nbd://host/x"));
}

#[test]
fn quoting() {
    for (list, expected) in [
        (r"thin_metadata=/a\,b", "/a,b"),
        (r#"thin_metadata="/a,b""#, "/a,b"),
        (r#"thin_metadata=/a",,"b"#, "/a,,b"),
        (r#"thin_metadata=/a\"b"#, "/a\"b"),
        (r"thin_metadata=/a\\,ro", r"/a\"),
        (r"thin_metadata=/a\b", r"/a\b"),
        (r"thin_metadata=/a\", r"/a\"),
    ] {
        assert_eq!(parsed(list).thin_metadata, Some(expected.into()), "{list}");
    }
    assert!(refused("thin_metadata=\"/a").0.contains("not closed"));
    let path = OsStr::from_bytes(b"thin_metadata=/a\xff");
    let options = parse(path, Unknown::Refused).unwrap();
    assert_eq!(options.thin_metadata.unwrap().as_os_str().as_bytes(), b"/a\xff");
}

#[test]
fn wrong_values_say_what_was_expected() {
    for list in [
        "uid=",
        "uid=-1",
        "uid=+1",
        "uid=root",
        "uid=4294967295",
        "uid=99999999999",
        "gid=x",
        "mode=8",
        "mode=1777",
        "umask=0o22",
        "max_read=",
        "max_read=4G",
        "map_cache=K",
        "map_cache=1X",
        "map_cache=-1",
        "map_cache=99999999999T",
        "thin_metadata=",
        "nbd=",
    ] {
        let (message, _) = refused(list);
        assert!(message.contains(list) && message.contains("expected"), "{message}");
    }
    for name in words::WITH_VALUE {
        assert!(refused(name).0.contains("needs a value"), "{name}");
    }
}

#[test]
fn unknown_words_are_named_with_their_neighbours() {
    assert_eq!(
        refused("alow_other"),
        ("unknown option 'alow_other'".to_owned(), Some("did you mean allow_other or allow-other?".to_owned()))
    );
    assert_eq!(refused("ro,frobnicate"), ("unknown option 'frobnicate'".to_owned(), None));
    for word in ["fd=3", "rootmode=40000", "user_id=0", "group_id=0", "blksize=512", "ro=1", "=", "loop", "allow_root"]
    {
        assert!(refused(word).0.starts_with("unknown option"), "{word}");
    }
    assert!(refused("remount,ro").0.contains("unmount it"));
    assert!(refused("auto_unmount").0.contains("not possible"));
}

#[test]
fn sloppy_turns_unknown_words_into_warnings_and_nothing_else() {
    let options = parse(OsStr::new("frob,thing=1,ro"), Unknown::Tolerated).unwrap();
    assert_eq!(options.warnings, ["unknown option 'frob', ignored", "unknown option 'thing', ignored"]);
    assert!(parse(OsStr::new("uid=x"), Unknown::Tolerated).is_err());
    assert!(parse(OsStr::new("remount"), Unknown::Tolerated).is_err());
}

#[test]
fn any_bytes_give_a_value_or_an_error() {
    let seeds: [&[u8]; 4] =
        [b"rw,nosuid,uid=1,a=\"b,c\"", b"map_cache=16M,umask=022,\\,", b"\xff\xfe=,=", b"thin_metadata=/x,nbd=nbd://y"];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..20_000 {
        let mut bytes = seeds[round % seeds.len()].to_vec();
        for _ in 0..next() % 6 {
            let at = usize::try_from(next()).unwrap() % bytes.len();
            bytes[at] = b",=\\\"\0\xff0K-"[usize::try_from(next() % 9).unwrap()];
        }
        if let Ok(options) = parse(OsStr::from_bytes(&bytes), Unknown::Tolerated) {
            assert!(options.flags.contains(MsFlags::MS_RDONLY));
        }
    }
}
