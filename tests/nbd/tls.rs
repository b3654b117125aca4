//! TLS connections, with a certificate authority that the test creates.

use std::path::Path;

use blkholefs::testing::map::ExtentKind;
use blkholefs::testing::source::nbd::{Client, Uri};

use crate::common::nbd::{Server, directory};
use crate::common::{MIB, needs, run};
use crate::{default_client, read, runs_of};

/// Creates a certificate that `signer` signs, or a self-signed certificate authority without `signer`.
fn certificate(directory: &Path, name: &str, template: &str, signer: Option<&str>) {
    let path = |name: String| directory.join(name).to_str().unwrap().to_owned();
    let (key, certificate, info) =
        (path(format!("{name}-key.pem")), path(format!("{name}-cert.pem")), path(format!("{name}.info")));
    std::fs::write(&info, format!("expiration_days = 2\n{template}")).unwrap();
    run("certtool", ["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", &key]);
    let mut words = vec!["--load-privkey", &key, "--template", &info, "--outfile", &certificate];
    let (ca, ca_key) =
        (path(format!("{}-cert.pem", signer.unwrap_or(""))), path(format!("{}-key.pem", signer.unwrap_or(""))));
    match signer {
        None => words.push("--generate-self-signed"),
        Some(_) => words.extend(["--generate-certificate", "--load-ca-certificate", &ca, "--load-ca-privkey", &ca_key]),
    }
    run("certtool", words);
}

/// Creates a certificate authority with the name `ca`.
fn authority(directory: &Path) {
    certificate(directory, "ca", "cn = \"test\"\nca\ncert_signing_key\n", None);
}

/// Creates the files of a server that names itself by `nbd.example` and 127.0.0.1, and of its certificate authority.
pub fn server_certificates(directory: &Path) {
    authority(directory);
    let server =
        "cn = \"server\"\ndns_name = \"nbd.example\"\nip_address = \"127.0.0.1\"\ntls_www_server\nsigning_key\n";
    certificate(directory, "server", server, Some("ca"));
}

#[test]
fn tls_needs_a_trusted_certificate_with_the_name_of_the_host() {
    needs!(programs["nbdkit", "certtool"]);
    let (pki, other, bare) = (directory(), directory(), directory());
    server_certificates(pki.path());
    certificate(pki.path(), "client", "cn = \"client\"\ntls_www_client\nsigning_key\n", Some("ca"));
    authority(other.path());
    std::fs::copy(pki.path().join("ca-cert.pem"), bare.path().join("ca-cert.pem")).unwrap();

    let certificates = format!("--tls-certificates={}", pki.path().display());
    let words = ["--tls=require", &certificates, "memory", "64M"];
    let (_tcp, port) = Server::nbdkit_tcp(&words);
    let socket = pki.path().join("s");
    let _unix = Server::nbdkit(&socket, &words);
    let strict_socket = pki.path().join("strict");
    let _strict =
        Server::nbdkit(&strict_socket, &["--tls=require", &certificates, "--tls-verify-peer", "memory", "64M"]);
    let plain_socket = pki.path().join("plain");
    let _plain = Server::nbdkit(&plain_socket, &["memory", "64M"]);

    let (trust, distrust, anonymous) = (pki.path().display(), other.path().display(), bare.path().display());
    let tcp = format!("nbds://127.0.0.1:{port}/?");
    let unix = format!("nbds+unix:///?socket={}&", socket.display());
    let strict = format!("nbds+unix:///?socket={}&tls-hostname=nbd.example&", strict_socket.display());
    for valid in [
        format!("{tcp}tls-certificates={trust}"),
        format!("{tcp}tls-certificates={anonymous}&tls-hostname=nbd.example"),
        format!("{unix}tls-certificates={trust}&tls-hostname=nbd.example"),
        format!("{unix}tls-verify-peer=0"),
        format!("{strict}tls-certificates={trust}"),
    ] {
        let client = default_client(&valid);
        assert_eq!(read(&client, 5, 3_000_000), Ok(vec![0; 3_000_000]), "{valid}");
        assert_eq!(runs_of(&client), [(64 * MIB, ExtentKind::Hole)], "{valid}");
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let client = &client;
                scope.spawn(move || {
                    for turn in 0..20 {
                        assert_eq!(read(client, thread * 1_000_000 + turn, 200_000), Ok(vec![0; 200_000]));
                        assert_eq!(runs_of(client), [(64 * MIB, ExtentKind::Hole)]);
                    }
                });
            }
        });
    }
    for (invalid, reason) in [
        (format!("{tcp}tls-certificates={distrust}"), "TLS"),
        (format!("{tcp}tls-certificates={trust}&tls-hostname=other.example"), "TLS"),
        (format!("{unix}tls-certificates={trust}"), "TLS"),
        (format!("{tcp}tls-certificates=/nonexistent"), "ca-cert.pem"),
        (format!("{strict}tls-certificates={anonymous}"), ""),
        (format!("nbd://127.0.0.1:{port}/"), "demands TLS"),
        (format!("nbds+unix:///?tls-verify-peer=0&socket={}", plain_socket.display()), "cannot start TLS"),
    ] {
        let error = Client::open(&Uri::parse(&invalid).unwrap()).expect_err(&invalid);
        assert!(error.to_string().contains(reason), "{invalid}: {error}");
    }
}
