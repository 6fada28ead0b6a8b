// SPDX-License-Identifier: MIT OR Apache-2.0
//! Identities of a server and of its client. Only TLS 1.3 is supported, so there is no weaker form to fall back to.

use control::{Code, Failure};
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Error, RootCertStore,
};
use std::fmt;
use std::sync::Arc;

/// Trusted authorities, and the own certificate: the content of files of certificates and keys, in PEM.
#[derive(Clone)]
pub struct Credentials {
    /// Certificates of authorities, one of which must have signed the server's.
    pub authorities: Vec<u8>,
    /// Certificate for a server that asks for one, and its key.
    pub own: Option<(Vec<u8>, Vec<u8>)>,
}

/// Nothing of the key.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// A conversation with the server of `export` that has not begun; the server must have a certificate for `host`, a name
/// or an address.
pub(super) fn client(
    credentials: &Credentials,
    host: &str,
    export: &str,
) -> Result<ClientConnection, Failure> {
    let broken = |what: &str, why: &dyn fmt::Display| {
        Failure::invalid(format!(
            "{export} cannot be reached with TLS: {what} ({why})"
        ))
    };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|why| broken("its host is no name that a certificate could have", &why))?;
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|why| broken("TLS 1.3 is not there", &why))?
        .with_root_certificates(roots(credentials).map_err(|why| {
            broken(
                "the file of tls-ca= has no certificate of an authority: it has to be PEM",
                &why,
            )
        })?);
    let mut config = match &credentials.own {
        None => builder.with_no_client_auth(),
        Some((certificates, key)) => {
            let chain = chain(certificates).map_err(|why| {
                broken(
                    "the file of tls-cert= has no certificate: it has to be PEM",
                    &why,
                )
            })?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|why| {
                broken(
                    "the file of tls-key= has no key: it has to be PEM, without a password",
                    &why,
                )
            })?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|why| broken("the key of tls-key= is not that of the certificate", &why))?
        }
    };
    config.resumption = Resumption::disabled();
    ClientConnection::new(Arc::new(config), name)
        .map_err(|why| broken("the conversation cannot begin", &why))
}

fn roots(credentials: &Credentials) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(&credentials.authorities)? {
        roots.add(certificate).map_err(|why| why.to_string())?;
    }
    Ok(roots)
}

/// Certificates, one at least.
fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if all.is_empty() => Err("nothing is between BEGIN and END CERTIFICATE".into()),
        all => all.map_err(|why| why.to_string()),
    }
}

/// Returns the failure for a handshake of TLS that failed.
pub(super) fn refused(export: &str, host: &str, error: &Error) -> Failure {
    let (code, why) = match error {
        Error::InvalidCertificate(error) => (Code::Denied, certificate(host, error)),
        Error::AlertReceived(alert) => (Code::Denied, told(*alert)),
        Error::PeerIncompatible(_) => (Code::Unsupported, OLD.to_owned()),
        error => (
            Code::Denied,
            format!(
                "its answer is no TLS, or was changed on its way ({error}): check the network between this host and it"
            ),
        ),
    };
    Failure::new(
        code,
        format!("{export} is not used, because its server has not proved who it is: {why}"),
    )
}

const OLD: &str = "it does not speak TLS 1.3: install a newer one";

/// Returns what is wrong with a server's certificate, and what to do.
fn certificate(host: &str, error: &CertificateError) -> String {
    use CertificateError as E;
    match error {
        E::Expired | E::ExpiredContext { .. } => {
            "its certificate has expired: renew it, or set the clock of this host right".into()
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "its certificate is not valid yet: set the clock of this host right".into()
        }
        E::NotValidForName | E::NotValidForNameContext { .. } => format!(
            "its certificate is not for {host}: write the host as the certificate has it (subjectAltName), or have one \
             made that has {host}"
        ),
        E::UnknownIssuer | E::BadSignature => {
            "its certificate is not signed by an authority in the file of tls-ca=: put the certificate of the one \
             that has signed it there, if you trust that"
                .into()
        }
        other => format!(
            "its certificate cannot be used ({other}): have one made for a server (extendedKeyUsage serverAuth), by an \
             authority and not by itself"
        ),
    }
}

/// Returns what a server's alert means, and what to do.
fn told(alert: AlertDescription) -> String {
    use AlertDescription as A;
    match alert {
        A::CertificateRequired | A::HandshakeFailure => {
            "it wants a certificate of its client: give it one with tls-cert= and tls-key=".into()
        }
        A::UnknownCA
        | A::BadCertificate
        | A::UnsupportedCertificate
        | A::CertificateExpired
        | A::CertificateRevoked
        | A::CertificateUnknown
        | A::AccessDenied => format!(
            "it does not take the certificate of tls-cert= ({alert:?}): have that signed by the authority that the \
             server believes, or renew it"
        ),
        A::ProtocolVersion => OLD.into(),
        alert => format!("it ends the conversation ({alert:?}): see its log"),
    }
}
