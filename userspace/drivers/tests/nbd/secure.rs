// SPDX-License-Identifier: MIT OR Apache-2.0
//! The encryption of a server, which may go wrong in all ways.

use drivers::nbd::Credentials;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

/// A name that the server's certificates have.
pub(crate) const HOST: &str = "server.example";

/// A server's certificate and its behaviour.
#[derive(Clone, Debug)]
pub(crate) struct Secure {
    config: Arc<ServerConfig>,
    pub(crate) how: How,
}

/// Course of the encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// The connection is encrypted.
    Well,
    /// The server answers STARTTLS with this, and continues without encryption.
    Refuses(u32),
    /// A machine on the way has put in an answer first.
    Early,
    /// The server sends bytes that are no TLS.
    Garbage,
    /// The server sends half of its first message.
    Half,
    /// The server closes the connection.
    Closes,
}

/// A file of the tests.
pub(crate) fn file(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nbd/certs");
    PathBuf::from(folder).join(name)
}

fn content(name: &str) -> Vec<u8> {
    fs::read(file(name)).unwrap()
}

/// A server with a certificate of this name.
pub(crate) fn server(certificate: &str, how: How) -> Secure {
    encrypting(certificate, how, false)
}

/// A server that demands a certificate of its client.
pub(crate) fn server_for_known(certificate: &str) -> Secure {
    encrypting(certificate, How::Well, true)
}

fn encrypting(certificate: &str, how: How, is_asking: bool) -> Secure {
    let provider = Arc::new(default_provider());
    let chain = CertificateDer::pem_file_iter(file(&format!("{certificate}.pem"))).unwrap();
    let key = match certificate {
        "client" => "client.key",
        _ => "server.key",
    };
    let key = PrivateKeyDer::from_pem_file(file(key)).unwrap();
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap();
    let builder = match is_asking {
        false => builder.with_no_client_auth(),
        true => {
            let mut roots = RootCertStore::empty();
            let ca = CertificateDer::from_pem_file(file("ca.pem")).unwrap();
            roots.add(ca).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        }
    };
    let chain = chain.map(Result::unwrap).collect();
    Secure {
        config: Arc::new(builder.with_single_cert(chain, key).unwrap()),
        how,
    }
}

/// Returns the credentials that accept a correct server, and that server's name.
pub(crate) fn believed() -> (Credentials, &'static str) {
    (believing("ca.pem"), HOST)
}

/// Returns the credentials of a client that trusts this authority.
pub(crate) fn believing(authority: &str) -> Credentials {
    Credentials {
        authorities: content(authority),
        own: None,
    }
}

/// Returns the credentials of a client that trusts the tests' authority and has a certificate of its own.
pub(crate) fn known(certificate: &str, key: &str) -> Credentials {
    Credentials {
        own: Some((content(certificate), content(key))),
        ..believing("ca.pem")
    }
}

/// A client's connection.
pub(crate) enum Stream {
    Plain(UnixStream),
    Encrypted(Box<StreamOwned<ServerConnection, UnixStream>>),
}

impl Stream {
    /// Returns the connection below the encryption.
    pub(crate) fn raw(&mut self) -> &mut UnixStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Encrypted(stream) => &mut stream.sock,
        }
    }

    /// False if the client sees no more of it.
    pub(crate) fn encrypt(&mut self, secure: &Secure) -> io::Result<bool> {
        let mut connection = ServerConnection::new(secure.config.clone()).unwrap();
        let socket = self.raw();
        match secure.how {
            How::Closes => return Ok(false),
            How::Garbage => {
                let _ = socket.read(&mut [0; 1024])?;
                socket.write_all(&b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(9))?;
                // The client must end the connection.
                let _ = socket.read(&mut [0; 1024]);
                return Ok(false);
            }
            How::Half => {
                let mut words = Vec::new();
                connection.read_tls(socket)?;
                connection.process_new_packets().unwrap();
                while connection.wants_write() {
                    connection.write_tls(&mut words)?;
                }
                socket.write_all(&words[..words.len() / 2])?;
                return Ok(false);
            }
            How::Well | How::Early | How::Refuses(_) => {}
        }
        let socket = socket.try_clone()?;
        let mut stream = StreamOwned::new(connection, socket);
        let (connection, socket) = (&mut stream.conn, &mut stream.sock);
        while connection.is_handshaking() {
            // The handshake reports to the client any fault of its certificate.
            connection.complete_io(socket)?;
        }
        *self = Self::Encrypted(Box::new(stream));
        Ok(true)
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(bytes),
            Self::Encrypted(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Encrypted(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Encrypted(stream) => stream.flush(),
        }
    }
}
