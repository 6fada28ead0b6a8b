// SPDX-License-Identifier: MIT OR Apache-2.0
//! An export of an NBD server, in the syntax of a configuration.

use crate::Failure;
use percent_encoding::{percent_decode_str, utf8_percent_encode, AsciiSet, NON_ALPHANUMERIC};
use std::fmt;
use std::path::{Path, PathBuf};

/// The port of NBD servers.
const PORT: u16 = 10809;
/// Bytes of a name at most, as the protocol has it.
const LONGEST: usize = 4096;

/// Characters that need no escape in a path of an address.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Listener {
    /// At a unix socket.
    Unix(PathBuf),
    /// At a port of a host.
    Tcp {
        /// Name or address.
        host: String,
        /// Number.
        port: u16,
    },
}

/// An export: a server, and its name there. Its syntax is an NBD address, `nbd://host:port/name` or
/// `nbd+unix:///name?socket=/run/a.sock`, or that of QEMU's tools, `nbd:host:port:exportname=name` or
/// `nbd:unix:/run/a.sock:exportname=name`. Without a name it is the server's first one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Export {
    listener: Listener,
    name: String,
}

impl Export {
    /// Parses the text behind `nbd:` or `nbd+unix:`.
    ///
    /// # Errors
    /// It names no server.
    pub(crate) fn parse(argument: &str) -> Result<Self, Failure> {
        let parsed = match argument.strip_prefix("//") {
            Some(rest) => address(rest),
            None => words(argument),
        };
        let export = parsed.ok_or_else(|| {
            Failure::invalid(format!(
                "nbd:{argument:?} names no export of a server: write nbd://host:port/name or \
                 nbd+unix:///name?socket=/run/a.sock"
            ))
        })?;
        let has_control = |text: &str| text.contains(char::is_control);
        let is_clean = match &export.listener {
            Listener::Unix(path) => path.is_absolute() && !has_control(&path.to_string_lossy()),
            Listener::Tcp { host, .. } => !host.is_empty() && !host.contains(is_no_host),
        };
        if !is_clean || has_control(&export.name) || export.name.len() > LONGEST {
            return Err(Failure::invalid(format!(
                "{export} is no address of an export: a socket's path is absolute, a host is a name or an address, \
                 and a name has {LONGEST} bytes at most and no control characters"
            )));
        }
        Ok(export)
    }

    /// Returns the export with a name, which may be empty, of the server at a unix socket.
    #[must_use]
    pub fn at_socket(socket: PathBuf, name: String) -> Self {
        Self {
            listener: Listener::Unix(socket),
            name,
        }
    }

    /// Where its server listens.
    #[must_use]
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// The path of the socket, if it is one.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match &self.listener {
            Listener::Unix(path) => Some(path),
            Listener::Tcp { .. } => None,
        }
    }

    /// Its name; empty for the server's first one.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns this export with another path of its server's socket.
    #[must_use]
    pub fn at(self, socket: PathBuf) -> Self {
        Self {
            listener: Listener::Unix(socket),
            ..self
        }
    }
}

fn is_no_host(c: char) -> bool {
    !c.is_ascii_alphanumeric() && !matches!(c, '.' | '-' | '_' | ':' | '%')
}

/// Parses the text behind `//` in an address.
fn address(text: &str) -> Option<Export> {
    let (before, query) = match text.split_once('?') {
        Some((before, query)) => (before, Some(query)),
        None => (text, None),
    };
    let (host, name) = match before.split_once('/') {
        Some((host, name)) => (host, decoded(name)?),
        None => (before, String::new()),
    };
    let listener = match query {
        Some(query) if host.is_empty() => {
            Listener::Unix(decoded(query.strip_prefix("socket=")?)?.into())
        }
        Some(_) => return None,
        None => tcp(host)?,
    };
    Some(Export { listener, name })
}

/// As QEMU's tools write it.
fn words(text: &str) -> Option<Export> {
    let (place, name) = match text.split_once(":exportname=") {
        Some((place, name)) => (place, name.to_owned()),
        None => (text, String::new()),
    };
    let listener = match place.strip_prefix("unix:") {
        Some(path) => Listener::Unix(path.into()),
        None => tcp(place)?,
    };
    Some(Export { listener, name })
}

/// Parses a host, and a port if there is one.
fn tcp(text: &str) -> Option<Listener> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port)
        }
        None => match text.find(':') {
            Some(at) => text.split_at(at),
            None => (text, ""),
        },
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().ok()?,
        None if port.is_empty() => PORT,
        None => return None,
    };
    // Names of hosts have no case, and may end with the root's dot.
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    (!host.is_empty()).then_some(Listener::Tcp { host, port })
}

fn decoded(text: &str) -> Option<String> {
    let text = percent_decode_str(text).decode_utf8().ok()?;
    Some(text.into_owned())
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = utf8_percent_encode(&self.name, PLAIN);
        match &self.listener {
            Listener::Unix(path) => {
                let path = path.to_string_lossy();
                let path = utf8_percent_encode(&path, PLAIN);
                write!(f, "nbd+unix:///{name}?socket={path}")
            }
            Listener::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{name}")
            }
            Listener::Tcp { host, port } => write!(f, "nbd://{host}:{port}/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Export, Listener};
    use proptest::prelude::*;

    #[test]
    fn ways_to_write_an_export() {
        for (text, canonical) in [
            ("//a.example/disk", "nbd://a.example:10809/disk"),
            ("//a.example:99/disk", "nbd://a.example:99/disk"),
            ("//a.example", "nbd://a.example:10809/"),
            ("//[2001:db8::1]:99/a", "nbd://[2001:db8::1]:99/a"),
            ("//[2001:db8::1]", "nbd://[2001:db8::1]:10809/"),
            ("//A.Example./disk", "nbd://a.example:10809/disk"),
            ("//192.0.2.7/a%20b%2Fc", "nbd://192.0.2.7:10809/a%20b/c"),
            ("a.example:99", "nbd://a.example:99/"),
            ("a.example:99:exportname=x:y", "nbd://a.example:99/x%3Ay"),
            ("unix:/run/a.sock", "nbd+unix:///?socket=/run/a.sock"),
            (
                "unix:/run/a.sock:exportname=x",
                "nbd+unix:///x?socket=/run/a.sock",
            ),
            ("///x?socket=/run/a%3Fb", "nbd+unix:///x?socket=/run/a%3Fb"),
        ] {
            let export = Export::parse(text).unwrap();
            assert_eq!(export.to_string(), canonical, "{text}");
            let (_, again) = canonical.split_once(':').unwrap();
            assert_eq!(Export::parse(again).unwrap(), export);
        }
    }

    #[test]
    fn what_names_no_export() {
        for text in [
            "",
            "//",
            "///x",
            "//host:port/x",
            "//host:99999",
            "//a b/x",
            "//host/x?socket=/run/a",
            "///x?tls=yes",
            "///x?socket=run/a",
            "///x?socket=/run/%0a",
            "//host/%ff",
            "//host/%00",
            "unix:a.sock",
            "[::1",
            "host:",
        ] {
            let failure = Export::parse(text).expect_err(text);
            assert!(failure.message.contains("nbd"), "{failure}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(name in "\\PC{0,40}", path in "/\\PC{0,40}", host in "[a-z0-9-]{1,20}", port: u16) {
            for listener in [Listener::Unix(path.clone().into()), Listener::Tcp { host: host.clone(), port }] {
                let export = Export { listener, name: name.clone() };
                let text = export.to_string();
                let (_, argument) = text.split_once(':').unwrap();
                prop_assert_eq!(Export::parse(argument).unwrap(), export);
            }
        }
    }
}
