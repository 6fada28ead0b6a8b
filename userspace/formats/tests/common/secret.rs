// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted images of QEMU's tools, and the key that opens them.

use super::tools::{file, text, tool};
use super::SparseContent;
use diskio::{File, Runtime};
use formats::luks::ImageKey;
use std::fs;
use std::path::{Path, PathBuf};

/// The passphrase; each of its bytes counts.
pub(crate) const SECRET: &[u8] = "a sécret\n".as_bytes();

pub(crate) fn key() -> ImageKey {
    of(SECRET)
}

pub(crate) fn of(secret: &[u8]) -> ImageKey {
    ImageKey::new(secret.to_vec().into())
}

/// A folder with images, and the file with their key.
pub(crate) struct Safe {
    folder: tempfile::TempDir,
    object: String,
}

impl Safe {
    pub(crate) fn new() -> Self {
        let folder = super::tools::folder();
        let file = folder.path().join("key");
        fs::write(&file, SECRET).unwrap();
        let object = format!("secret,id=s,file={}", text(&file));
        Self { folder, object }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.folder().join("image")
    }

    pub(crate) fn file(&self, runtime: &Runtime, write: bool) -> File {
        file(&runtime.io, &self.image(), write)
    }

    /// Its bytes, for a world.
    pub(crate) fn content(&self) -> Vec<SparseContent> {
        vec![SparseContent::from(&fs::read(self.image()).unwrap())]
    }

    /// Makes the image: the options of qemu-img name its key `s`.
    pub(crate) fn create(&self, format: &str, options: &str, size: &str) {
        let image = self.image();
        let object = ["create", "-q", "--object", &self.object];
        let rest = ["-f", format, "-o", options, text(&image), size];
        tool("qemu-img", &[&object[..], &rest].concat());
    }

    /// Makes a LUKS image whose key is cheap, for tests that open it often.
    pub(crate) fn create_luks(&self, options: &str, size: &str) {
        self.create("luks", &format!("key-secret=s,iter-time=1,{options}"), size);
    }

    fn opts(&self, format: &str) -> String {
        let key = match format {
            "luks" => "key-secret=s",
            _ => "encrypt.key-secret=s",
        };
        format!(
            "driver={format},{key},file.filename={}",
            text(&self.image())
        )
    }

    /// Returns the content that QEMU reads from it.
    pub(crate) fn read(&self, format: &str) -> Vec<u8> {
        let raw = self.folder().join("content.raw");
        let args = ["convert", "-t", "unsafe", "--object", &self.object];
        let opts = self.opts(format);
        let rest = ["--image-opts", &opts, "-O", "raw", text(&raw)];
        tool("qemu-img", &[&args[..], &rest].concat());
        fs::read(raw).unwrap()
    }

    /// Has qemu-io do something with it.
    pub(crate) fn io(&self, format: &str, commands: &[&str]) {
        let opts = self.opts(format);
        let mut args = vec!["--object", &self.object, "--image-opts"];
        commands
            .iter()
            .for_each(|command| args.extend(["-c", command]));
        args.push(&opts);
        tool("qemu-io", &args);
    }

    /// QEMU finds nothing wrong with it.
    pub(crate) fn check(&self) {
        let opts = self.opts("qcow2");
        let args = ["check", "--object", &self.object, "--image-opts", &opts];
        tool("qemu-img", &args);
    }
}
