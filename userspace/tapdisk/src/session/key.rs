// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key of an encrypted image: the supervisor opens its file, and only this process reads the content.

use super::image::Parts;
use control::tapdisk::RequestedFile;
use control::Failure;
use formats::luks::ImageKey;
use std::fs::File;

impl Parts<'_> {
    /// The key of the image, if it has one.
    pub(super) async fn key(&self) -> Result<Option<ImageKey>, Failure> {
        let target = &self.open.target;
        let Some(path) = target.key() else {
            return Ok(None);
        };
        if !self.open.may_ask {
            return Err(Failure::unsupported(format!(
                "{target} has a key, which only a supervisor gives: let blktapctrl serve it"
            )));
        }
        let target = target.clone();
        let given = self
            .session
            .needs
            .ask(RequestedFile::Key { target })
            .await?;
        let key = ImageKey::read(File::from(given.fd)).map_err(|failure| {
            let name = path.display();
            Failure::new(failure.code, format!("key={name}: {}", failure.message))
        })?;
        Ok(Some(key))
    }
}
