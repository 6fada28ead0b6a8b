// SPDX-License-Identifier: MIT OR Apache-2.0
//! Xenstore, as far as the supervisor needs it. Paths are relative to the directory of our domain
//! (`backend/vbd/3/51712`) or absolute.

use futures::{Stream, StreamExt};
use std::future::Future;
use std::io;
use std::pin::Pin;
use xenstore_rs::tokio::XsTokio;
use xenstore_rs::{AsyncWatch, AsyncXs};

/// Future of an answer.
pub type LaterAnswer<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;
/// The paths at which something changed, until the connection ends.
pub type Changes = Pin<Box<dyn Stream<Item = String>>>;

/// A connection. Behind a trait so that a test needs no Xen.
pub trait Store {
    /// The value of a key; nothing if there is no such key.
    fn read<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Option<String>>>;
    /// The names below a key; none if there is no such key.
    fn list<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Vec<String>>>;
    /// Writes a key.
    fn write<'a>(&'a self, path: &'a str, value: &'a str) -> LaterAnswer<'a, io::Result<()>>;
    /// Removes a key and all below it; success if there is none.
    fn remove<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<()>>;
    /// Tells about each change at or below a key, and once at first.
    fn watch<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Changes>>;
}

/// The store of the running host.
#[derive(Clone, Debug)]
pub struct Xenstore(XsTokio);

impl Xenstore {
    /// Connects.
    ///
    /// # Errors
    /// There is none: this is no Xen domain, or xenstored does not run.
    pub async fn connect() -> io::Result<Xenstore> {
        XsTokio::new().await.map(Xenstore)
    }
}

/// That there is no such key is no error.
fn or_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Store for Xenstore {
    fn read<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Option<String>>> {
        Box::pin(async move {
            let value = or_none(AsyncXs::read(&self.0, path).await)?;
            Ok(value.map(|value| value.into()))
        })
    }

    fn list<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Vec<String>>> {
        Box::pin(async move {
            let names = or_none(AsyncXs::directory(&self.0, path).await)?;
            let names = names.unwrap_or_default().into_iter().map(String::from);
            Ok(names.filter(|name| !name.is_empty()).collect())
        })
    }

    fn write<'a>(&'a self, path: &'a str, value: &'a str) -> LaterAnswer<'a, io::Result<()>> {
        Box::pin(AsyncXs::write(&self.0, path, value))
    }

    fn remove<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<()>> {
        Box::pin(async move { or_none(AsyncXs::rm(&self.0, path).await).map(drop) })
    }

    fn watch<'a>(&'a self, path: &'a str) -> LaterAnswer<'a, io::Result<Changes>> {
        Box::pin(async move {
            let mut changes = self.0.watch(path).await?;
            // The library stops answering all callers while an event waits to be taken, so each one is taken at once,
            // whatever its receiver waits for.
            let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
            tokio::task::spawn_local(async move {
                while let Some(path) = changes.next().await {
                    if sender.send(String::from(path)).is_err() {
                        return;
                    }
                }
            });
            let stream = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
            Ok(Box::pin(stream) as Changes)
        })
    }
}

/// A backend's directory as the supervisor names it: relative to our domain's directory.
#[must_use]
pub fn relative(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    let Some(rest) = path.strip_prefix("/local/domain/") else {
        return path;
    };
    rest.split_once('/').map_or(path, |(_, rest)| rest)
}

/// The directory of the backend that holds a path: `backend/vbd/3/51712` for
/// `backend/vbd/3/51712/state`. Nothing for what is above or elsewhere.
#[must_use]
pub fn directory(path: &str) -> Option<&str> {
    let path = relative(path);
    let mut ends = path.match_indices('/').map(|(at, _)| at);
    path.strip_prefix("backend/")?;
    match (ends.nth(2), ends.next()) {
        (Some(_), Some(end)) => path.get(..end),
        (Some(_), None) => Some(path),
        (None, _) => None,
    }
}

/// Whether a key cannot be read because it is another domain's: xenstore shows those to dom0 alone, and not to a driver
/// domain.
#[must_use]
pub fn is_hidden(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// The domain of the frontend of a backend's directory.
#[must_use]
pub fn domain(directory: &str) -> Option<u32> {
    relative(directory).split('/').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{directory, domain, relative};

    #[test]
    fn a_directory_names_its_domain() {
        assert_eq!(domain("backend/vbd/3/51712"), Some(3));
        assert_eq!(domain("/local/domain/0/backend/vbd3/12/51712"), Some(12));
        assert_eq!(domain("backend/vbd"), None);
    }

    #[test]
    fn directories_of_backends() {
        for (path, expected) in [
            ("backend/vbd/3/51712", Some("backend/vbd/3/51712")),
            ("backend/vbd/3/51712/state", Some("backend/vbd/3/51712")),
            ("backend/vbd/3/51712/a/b", Some("backend/vbd/3/51712")),
            (
                "/local/domain/0/backend/vbd3/3/51712/a",
                Some("backend/vbd3/3/51712"),
            ),
            ("backend/vbd/3", None),
            ("backend", None),
            ("device/vbd/3/51712", None),
        ] {
            assert_eq!(directory(path), expected, "{path}");
        }
        assert_eq!(
            relative("/local/domain/12/backend/vbd/1/2/"),
            "backend/vbd/1/2"
        );
        assert_eq!(relative("/local/domain/12"), "/local/domain/12");
    }
}
