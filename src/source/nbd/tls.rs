//! The TLS configuration: certificates of authorities, and the client's own certificate.
//!
//! The file names are those of libnbd and qemu: `ca-cert.pem`, and `client-cert.pem` with `client-key.pem` for servers
//! that demand a client certificate.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::uri::{Tls, Transport, Uri};
use crate::error::{Error, Result};

/// The configuration of TLS connections to the server of one URI.
#[derive(Clone, Debug)]
pub struct TlsSettings {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl TlsSettings {
    /// Reads the certificates that `uri` names; `None` when it is without TLS.
    ///
    /// # Errors
    ///
    /// Files that are missing or are not certificates, or a host name that no certificate can have.
    pub fn of(uri: &Uri) -> Result<Option<Self>> {
        let Some(tls) = uri.tls() else { return Ok(None) };
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::failed(format!("cannot use TLS: {error}")))?;
        let builder = match &tls.certificates {
            Some(directory) if tls.verify_peer => {
                builder.with_root_certificates(roots(&directory.join("ca-cert.pem"))?)
            }
            _ => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider))),
        };
        let client = tls.certificates.as_deref().filter(|directory| directory.join("client-cert.pem").exists());
        let config = match client {
            None => builder.with_no_client_auth(),
            Some(directory) => {
                let (chain, key) = (directory.join("client-cert.pem"), directory.join("client-key.pem"));
                builder
                    .with_client_auth_cert(certificates(&chain)?, private_key(&key)?)
                    .map_err(|error| bad(&chain, &error))?
            }
        };
        Ok(Some(Self { config: Arc::new(config), name: name(uri, tls)? }))
    }

    /// The client side of a new TLS connection.
    ///
    /// # Errors
    ///
    /// TLS cannot use the configuration.
    pub fn connection(&self) -> Result<ClientConnection> {
        ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|error| Error::failed(format!("cannot use TLS: {error}")))
    }
}

/// The name that the server's certificate must have: the one in the URI, or the host. A Unix socket has the host
/// `localhost`.
fn name(uri: &Uri, tls: &Tls) -> Result<ServerName<'static>> {
    let name = match (&tls.hostname, uri.transport()) {
        (Some(name), _) => name,
        (None, Transport::Tcp { host, .. }) => host,
        (None, Transport::Unix { .. }) => "localhost",
    };
    ServerName::try_from(name.to_owned())
        .map_err(|_| Error::usage(format!("no certificate can have the host name {name}")).on(uri.to_string()))
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| bad(path, &error))?;
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let all: std::result::Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match all {
        Ok(none) if none.is_empty() => Err(Error::failed("it has no certificate").on(path)),
        Ok(all) => Ok(all),
        Err(error) => Err(bad(path, &error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| bad(path, &error))
}

fn bad(path: &Path, error: &impl std::fmt::Display) -> Error {
    Error::failed(format!("cannot use for TLS: {error}")).on(path)
}

/// Accepts every certificate, for `tls-verify-peer=0`. The server must still have the private key of its certificate.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
