use super::*;

fn tcp(host: &str, port: u16) -> Transport {
    Transport::Tcp { host: host.to_owned(), port }
}

fn unix(socket: impl Into<PathBuf>) -> Transport {
    Transport::Unix { socket: socket.into() }
}

/// The absolute path of a name in the current directory.
fn here(name: &str) -> PathBuf {
    std::env::current_dir().unwrap().join(name)
}

#[test]
fn the_forms_of_the_standard() {
    for (text, transport, export) in [
        ("nbd://example.com/disk", tcp("example.com", 10809), "disk"),
        ("nbd://example.com", tcp("example.com", 10809), ""),
        ("nbd://example.com/", tcp("example.com", 10809), ""),
        ("nbd://example.com:99//disk", tcp("example.com", 99), "/disk"),
        ("nbd://example.com:/hello%20world", tcp("example.com", 10809), "hello world"),
        ("NBD://[::1]:1/a", tcp("::1", 1), "a"),
        ("nbd://[fe80::1%25eth0]/%C3%A9", tcp("fe80::1%eth0", 10809), "\u{e9}"),
        ("nbd+unix:///x?socket=/run/a%26b", unix("/run/a&b"), "x"),
        ("nbd+unix://?socket=nbd.sock", unix(here("nbd.sock")), ""),
        ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract"), ""),
    ] {
        let uri = Uri::parse(text).unwrap();
        assert_eq!((uri.transport(), uri.export(), uri.tls()), (&transport, export, None), "{text}");
        assert_eq!(uri.to_string(), text);
    }
}

#[test]
fn tls_parameters() {
    let tls = |certificates: Option<&str>, hostname: Option<&str>, verify_peer| Tls {
        certificates: certificates.map(here),
        hostname: hostname.map(str::to_owned),
        verify_peer,
    };
    for (text, wanted) in [
        ("nbds://h/?tls-certificates=/pki", tls(Some("/pki"), None, true)),
        ("nbds://h/?tls-type=x509&tls-certificates=pki;tls-hostname=x", tls(Some("pki"), Some("x"), true)),
        ("nbds+unix:///?socket=s&tls-verify-peer=0", tls(None, None, false)),
        ("nbds+unix:///?socket=s&tls-verify-peer=1&tls-certificates=p", tls(Some("p"), None, true)),
    ] {
        assert_eq!(Uri::parse(text).unwrap().tls(), Some(&wanted), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (text, part) in [
        ("/dev/sda", "no scheme"),
        ("nbd+vsock://1/", "nbd+vsock"),
        ("nbd:///x", "no host"),
        ("nbd://h:65536/", "65536"),
        ("nbd://h:-1/", "-1"),
        ("nbd://::1/", "brackets"),
        ("nbd://[::1/", "]"),
        ("nbd://[::g]/", "IPv6"),
        ("nbd://[::1]x/", "PORT"),
        ("nbd://user@h/", "user"),
        ("nbd://h/%4", "%"),
        ("nbd://h/%FF", "UTF-8"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/a#b", "fragment"),
        ("nbd://h/?socket=/s", "nbd+unix"),
        ("nbd://h/?x-new=1", "x-new"),
        ("nbd://h/?tls-hostname=a", "nbds"),
        ("nbd://h/?tls-verify-peer=1", "nbds"),
        ("nbd+unix:///x", "socket"),
        ("nbd+unix:///x?socket=", "socket"),
        ("nbd+unix:///x?socket=%00", "socket"),
        ("nbd+unix:///x?socket=a&socket=b", "twice"),
        ("nbd+unix://host/x?socket=a", "host"),
        ("nbds://h/", "tls-certificates"),
        ("nbds://h/?tls-type=psk", "psk"),
        ("nbds://h/?tls-verify-peer=maybe", "maybe"),
    ] {
        let error = Uri::parse(text).unwrap_err();
        assert!(error.to_string().contains(part), "{text}: {error}");
        assert_eq!(error.exit_code(), 1);
    }
    assert!(Uri::parse(&format!("nbd://h/{}", "x".repeat(MAX_STRING))).is_ok());
    assert!(Uri::parse(&format!("nbd://h/{}", "x".repeat(MAX_STRING + 1))).is_err());
    assert!(Uri::parse(&format!("nbd://h/{}", "x".repeat(MAX_URI))).is_err());
}

#[test]
fn a_file_is_named_after_the_export() {
    for (text, name) in [
        ("nbd://h", "nbd"),
        ("nbd://h/disk.img", "disk.img"),
        ("nbd://h//srv/disk.img", "disk.img"),
        ("nbd://h/disk/", "disk"),
        ("nbd://h/..", "nbd"),
    ] {
        assert_eq!(Uri::parse(text).unwrap().file_name(), name, "{text}");
    }
}

#[test]
fn paths_become_absolute() {
    let uri = Uri::parse("nbds+unix:///?socket=s&tls-certificates=p").unwrap();
    assert_eq!(uri.transport(), &unix(here("s")));
    assert_eq!(uri.tls().unwrap().certificates, Some(here("p")));
    let hidden = Uri::parse("nbd+unix:///?socket=%00s").unwrap();
    assert_eq!(hidden.transport(), &unix("\0s"));
}

proptest::proptest! {
    /// Any text is a URI or an error; what is read never leaves the limits of the protocol.
    #[test]
    fn noise(scheme in "nbds?(\\+unix)?://", rest in "[a-z0-9%:@/?&=;#.\\[\\]\\PC-]{0,80}", end in "(\\?socket=[a-z%0-9]{1,9})?") {
        let text = format!("{scheme}{rest}{end}");
        if let Ok(uri) = Uri::parse(&text) {
            proptest::prop_assert!(uri.export().len() <= MAX_STRING && !uri.export().contains('\0'));
            proptest::prop_assert!(!uri.file_name().is_empty() && !uri.file_name().contains('/'));
            proptest::prop_assert_eq!(uri.tls().is_some(), scheme.starts_with("nbds"));
            proptest::prop_assert_eq!(uri.to_string(), text);
        }
    }
}
