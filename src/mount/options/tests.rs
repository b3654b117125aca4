use super::*;
use crate::source::nbd::uri::Transport;

fn parsed(list: &str) -> ParsedOptions {
    parse(OsStr::new(list), UnknownOptions::Refuse, FirstRw::IsImplied)
        .unwrap_or_else(|error| panic!("{list}: {error}"))
}

fn refused(list: &str) -> (String, Option<String>) {
    let error = parse(OsStr::new(list), UnknownOptions::Refuse, FirstRw::IsImplied).expect_err(list);
    assert_eq!(error.exit_code(), 1, "{list}");
    (error.to_string(), error.hint_text().map(str::to_owned))
}

#[test]
fn every_flag_word_sets_or_clears_its_flag() {
    let default = MountOptions::default().flags;
    for (name, set, clear) in words::FLAGS {
        let flags = parsed(name).mount.flags;
        let expected = if *name == "rw" { default } else { (default | *set).difference(*clear) };
        assert_eq!(flags, expected, "{name}");
    }
    assert_eq!(parsed("exec,suid,dev").mount.flags, MsFlags::MS_RDONLY);
    assert_eq!(parsed("suid,nosuid").mount.flags, default, "the last word wins");
    assert_eq!(parsed("nosymfollow").mount.flags.bits() & 256, 256);
}

#[test]
fn options_for_other_programs_change_nothing() {
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
        assert_eq!(parsed(word), ParsedOptions::default(), "{word:?}");
    }
}

/// The lists that mount(8) of util-linux 2.38.1 was seen to pass.
#[test]
fn lists_that_mount_passes() {
    assert_eq!(parsed("rw"), ParsedOptions::default());
    let odd = parsed("rw,nosuid,nodev,mode=0440,user,nofail,_netdev,exec");
    assert_eq!(odd.mount.mode, Some(0o440));
    assert_eq!(odd.mount.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
    assert_eq!(odd.warnings, [""; 0], "rw comes first from mount(8) itself");
    let nofail = MountOptions { nofail: true, ..MountOptions::default() };
    assert_eq!(parsed("ro,noexec,nosuid,nodev,user,nofail").mount, nofail);
    assert!(parsed("rw,allow_other,").mount.allow_other, "a trailing comma is left where a word was taken out");
}

#[test]
fn only_who_asks_for_it_can_write() {
    let writable = |list: &str, first_rw| {
        let parsed = parse(OsStr::new(list), UnknownOptions::Refuse, first_rw).expect(list);
        assert_eq!(parsed.mount.ownership().is_writable, parsed.mount.is_writable(), "{list}");
        parsed.mount.is_writable()
    };
    for (list, by_mount, by_user) in [
        ("", false, false),
        ("nofail", false, false),
        ("rw", false, true),
        ("rw,noatime", false, true),
        ("ro", false, false),
        ("rw,writable", true, true),
        ("rw,nosuid,writable,nofail", true, true),
        ("writable", true, true),
        ("ro,writable", false, false),
        ("rw,ro,writable", false, false),
        ("ro,rw,writable", true, true),
        ("writable,ro", false, false),
        ("rw,ro", false, false),
        ("noatime,rw", true, true),
        ("ro,rw", true, true),
    ] {
        assert_eq!(writable(list, FirstRw::IsImplied), by_mount, "{list}");
        assert_eq!(writable(list, FirstRw::IsWanted), by_user, "{list}");
        assert_eq!(writable(list, FirstRw::IsUnclear), by_mount, "{list}");
    }
    let warnings =
        |list: &str, first_rw| parse(OsStr::new(list), UnknownOptions::Refuse, first_rw).expect(list).warnings.len();
    assert_eq!(warnings("rw,nofail", FirstRw::IsUnclear), 1);
    for list in ["rw,writable", "nofail", "", "ro"] {
        assert_eq!(warnings(list, FirstRw::IsUnclear), 0, "{list}");
    }
    assert_eq!(warnings("rw,nofail", FirstRw::IsImplied), 0);
    for (list, why) in [
        ("writable,static", "rw is not possible with static: it says that nobody writes"),
        (
            "writable,thin_metadata=/x",
            "rw is not possible with thin_metadata: the volumes of an offline pool are only read",
        ),
        ("writable,used", "rw is not possible with compact, since or used: the device of a view must not change"),
    ] {
        assert_eq!(refused(list).0, why);
    }
}

#[test]
fn options_of_this_program() {
    assert!(parsed("allow_other").mount.allow_other);
    assert!(parsed("allow-other").mount.allow_other);
    assert!(parsed("direct_io").mount.direct_io);
    assert!(parsed("static").source.is_static && !parsed("").source.is_static);
    assert_eq!(parsed("uid=0,gid=4294967294").mount.uid, Some(0));
    assert_eq!(parsed("uid=0,gid=4294967294").mount.gid, Some(u32::MAX - 1));
    assert_eq!(parsed("mode=444,umask=0027").mount.mode, Some(0o444));
    assert_eq!(parsed("mode=444,umask=0027").mount.umask, Some(0o27));
    assert_eq!(parsed("max_read=128K").mount.max_read, Some(Bytes::new(131_072)));
    assert_eq!(parsed("map_cache=0").mount.limits.map_cache, Some(Bytes::ZERO));
    assert_eq!(parsed("map_cache=16M").mount.limits.map_cache, Some(Bytes::new(16 << 20)));
    assert_eq!(parsed("read_ahead=0").mount.limits.read_ahead, Some(Bytes::ZERO));
    assert_eq!(parsed("queue_depth=16").mount.limits.queue_depth, Some(16));
    assert_eq!(parsed("thin_metadata=/dev/vg/meta=1").source.thin_metadata, Some("/dev/vg/meta=1".into()));
    assert_eq!(parsed("nbd=nbd://host/x").source.nbd, Some(Uri::parse("nbd://host/x").unwrap()));
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
        assert_eq!(parsed(list).source.thin_metadata, Some(expected.into()), "{list}");
    }
    assert!(refused("thin_metadata=\"/a").0.contains("not closed"));
    let path = OsStr::from_bytes(b"thin_metadata=/a\xff");
    let options = parse(path, UnknownOptions::Refuse, FirstRw::IsImplied).unwrap();
    assert_eq!(options.source.thin_metadata.unwrap().as_os_str().as_bytes(), b"/a\xff");
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
        "read_ahead=-1",
        "queue_depth=0",
        "queue_depth=65536",
        "queue_depth=+1",
        "map_cache=1X",
        "map_cache=-1",
        "map_cache=99999999999T",
        "thin_metadata=",
        "nbd=",
        "name=",
        "name=.",
        "name=..",
        "name=a/b",
        "name=/",
        LONG_NAME,
    ] {
        let (message, _) = refused(list);
        assert!(message.contains(list) && message.contains("expected"), "{message}");
    }
    for name in words::MOUNT_WITH_VALUE.iter().chain(words::SOURCE).chain(words::IGNORED_WITH_VALUE) {
        if words::IGNORED.contains(name) {
            continue;
        }
        assert!(refused(name).0.contains("needs a value"), "{name}");
    }
}

/// A name of 256 bytes.
const LONG_NAME: &str = concat!(
    "name=",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
);

#[test]
fn a_name_is_one_file() {
    for name in ["a", "disk.img", "...", "-o", "a b", &LONG_NAME[5..260]] {
        assert_eq!(parsed(&format!("name={name}")).source.name, Some(name.into()), "{name}");
    }
    assert_eq!(parsed("name=\"a,b\",ro").source.name, Some("a,b".into()));
    let (message, _) = refused("name=a,thin_metadata=/m");
    assert_eq!(message, "option 'name' is for one file, and a thin pool has one for each volume");
}

#[test]
fn unknown_words_are_named_with_their_neighbours() {
    assert_eq!(
        refused("alow_other"),
        ("unknown option 'alow_other'".to_owned(), Some("did you mean allow_other?".to_owned()))
    );
    assert_eq!(refused("ro,frobnicate"), ("unknown option 'frobnicate'".to_owned(), None));
    for word in ["fd=3", "rootmode=40000", "user_id=0", "group_id=0", "blksize=512", "=", "loop", "allow_root"] {
        assert!(refused(word).0.starts_with("unknown option"), "{word}");
    }
    for word in ["static=yes", "ro=1", "allow_other=1", "allow-other=", "remount=x"] {
        let name = word.split('=').next().unwrap();
        assert_eq!(refused(word), (format!("option '{name}' takes no value"), None));
    }
    assert!(refused("remount,ro").0.contains("unmount it"));
    assert!(refused("auto_unmount").0.contains("not possible"));
}

#[test]
fn sloppy_turns_unknown_words_into_warnings_and_nothing_else() {
    let options = parse(OsStr::new("frob,thing=1,ro"), UnknownOptions::Warn, FirstRw::IsImplied).unwrap();
    assert_eq!(options.warnings, ["unknown option 'frob', ignored", "unknown option 'thing', ignored"]);
    assert!(parse(OsStr::new("uid=x"), UnknownOptions::Warn, FirstRw::IsImplied).is_err());
    assert!(parse(OsStr::new("remount"), UnknownOptions::Warn, FirstRw::IsImplied).is_err());
}

#[test]
fn paths_become_absolute() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(parsed("thin_metadata=meta").source.thin_metadata, Some(here.join("meta")));
    let uri = parsed("nbd=nbd+unix:///?socket=s").source.nbd.unwrap();
    assert_eq!(uri.transport(), &Transport::Unix { socket: here.join("s") });
    assert!(refused("nbd=http://h/").0.contains("http"));
}

#[test]
fn mode_and_umask_make_the_permissions() {
    for (list, mode) in [("", 0o777), ("mode=444", 0o444), ("umask=027", 0o750), ("mode=444,umask=0027", 0o440)] {
        assert_eq!(
            parsed(list).mount.ownership(),
            Ownership { uid: None, gid: None, mode, is_writable: false },
            "{list}"
        );
    }
}

#[test]
fn a_command_without_a_mount_refuses_options_of_mounts() {
    let source = |list: &str| parse_source(OsStr::new(list), "map");
    assert_eq!(source(",").unwrap(), SourceOptions::default());
    assert_eq!(source("thin_metadata=/m,nbd=nbd://h/x").unwrap(), parsed("thin_metadata=/m,nbd=nbd://h/x").source);
    let known = words::FLAGS.iter().map(|flag| flag.0).chain(words::REFUSED.iter().map(|refused| refused.0));
    let lists = [words::IGNORED, words::IGNORED_WITH_VALUE, words::MOUNT_WITH_VALUE, words::MOUNT_PLAIN];
    for name in
        known.chain(lists.into_iter().flatten().copied().filter(|name| !name.is_empty())).chain(["x-systemd.automount"])
    {
        for list in [name.to_owned(), format!("{name}=1"), format!("thin_metadata=/m,{name}")] {
            let error = source(&list).unwrap_err();
            assert_eq!(error.to_string(), format!("option '{name}' is for mounts, and means nothing to map"));
            assert_eq!(
                (error.exit_code(), error.hint_text()),
                (1, Some("map accepts thin_metadata=, nbd=, since=, cluster_size=, backing=, compact, used"))
            );
        }
    }
    assert_eq!(source("frob").unwrap_err().to_string(), "unknown option 'frob'");
    assert!(source("nbd").unwrap_err().to_string().contains("needs a value"));
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
        if let Ok(options) = parse(OsStr::from_bytes(&bytes), UnknownOptions::Warn, FirstRw::IsImplied) {
            let asks = |word: &[u8]| word == b"rw" || word == b"writable";
            assert!(!options.mount.is_writable() || bytes.split(|byte| b",\"\\".contains(byte)).any(asks));
        }
    }
}

#[test]
fn an_option_of_views_needs_a_view() {
    for (list, wrong) in [
        ("cluster_size=64K", "option 'cluster_size' has no effect without compact or since"),
        ("used,cluster_size=64K", "option 'cluster_size' has no effect without compact or since"),
        ("compact,backing=a", "option 'backing' has no effect without since"),
    ] {
        assert_eq!(parse(OsStr::new(list), UnknownOptions::Refuse, FirstRw::IsImplied).unwrap_err().to_string(), wrong);
        assert_eq!(parse_source(OsStr::new(list), "map").unwrap_err().to_string(), wrong);
    }
    for list in ["compact,cluster_size=64K", "since=a,cluster_size=64K,backing=b"] {
        assert!(parse(OsStr::new(list), UnknownOptions::Refuse, FirstRw::IsImplied).is_ok(), "{list}");
    }
}
