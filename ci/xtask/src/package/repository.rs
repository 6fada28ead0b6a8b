// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A signed repository of the packages, for apt.
//!
//! All files are in one folder, which a web server or a mount can offer as it is:
//!
//! | file | content |
//! |---|---|
//! | `*.deb` | the packages of this commit for each kernel, and those that were there before |
//! | `Packages`, `Packages.xz` | the index that apt reads |
//! | `Release`, `InRelease` | hashes of the index; the second one with the signature |
//! | `xen-blkback-rs.asc` | the public key |
//! | `xen-blkback-rs.sources` | the entry for `/etc/apt/sources.list.d` |

use crate::root::Root;
use crate::{artifacts, kernel, run};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The public key, as hosts have it in /etc/apt/keyrings.
pub(crate) const KEY: &str = "xen-blkback-rs.asc";
const SOURCES: &str = "xen-blkback-rs.sources";

/// Makes the index in `/mnt/a`. A host finds an index by its hash, so the old `InRelease` stays usable until the new one
/// takes its place.
const INDEX: &str = "cd /mnt/a
apt-ftparchive packages . >Packages.new
xz --keep --force --stdout Packages.new >Packages.xz.new
for file in Packages Packages.xz; do
	hash=$(sha256sum <$file.new)
	mkdir -p by-hash/SHA256
	cp $file.new by-hash/SHA256/${hash%% *}
	mv $file.new $file
done
rm -f Release InRelease.new
apt-ftparchive \
	-o APT::FTPArchive::Release::Origin=xen-blkback-rs \
	-o APT::FTPArchive::Release::Label=xen-blkback-rs \
	-o APT::FTPArchive::Release::Acquire-By-Hash=yes \
	release . >/tmp/Release
mv /tmp/Release Release";

/// A key for signatures, in the keyring of gpg.
#[derive(Debug)]
pub(crate) struct SigningKey<'a> {
    /// Fingerprint, or address of its owner.
    pub(crate) name: &'a str,
    /// Folder of gpg; the default is the caller's own.
    pub(crate) home: Option<&'a Path>,
}

impl SigningKey<'_> {
    fn gpg(&self) -> Command {
        let mut gpg = Command::new("gpg");
        gpg.args(["--batch", "--yes", "--quiet"]);
        if let Some(home) = self.home {
            gpg.arg("--homedir").arg(home);
        }
        gpg
    }

    /// Refuses a key that cannot sign, before anything is built.
    fn check(&self) -> Result<()> {
        let mut list = self.gpg();
        let known = run::output(list.args(["--with-colons", "--list-secret-keys", "--", self.name]))
            .with_context(|| {
                format!(
                    "gpg has no secret key `{}`: see `gpg --list-secret-keys`, or make one with `gpg --quick-generate-key`",
                    self.name
                )
            })?;
        ensure!(
            known.lines().any(|line| line.starts_with("sec:")),
            "gpg has no secret key `{}`: see `gpg --list-secret-keys`",
            self.name
        );
        Ok(())
    }

    /// Signs the index in a folder, and adds the public key.
    fn sign(&self, folder: &Path) -> Result<()> {
        let new = folder.join("InRelease.new");
        let mut sign = self.gpg();
        sign.args(["--local-user", self.name, "--digest-algo", "SHA512"]);
        sign.args(["--clearsign", "--output"]).arg(&new);
        run::output(sign.arg(folder.join("Release")))?;
        let mut export = self.gpg();
        export.args(["--armor", "--export-options", "export-minimal"]);
        let key = run::output(export.args(["--export", "--", self.name]))?;
        ensure!(!key.is_empty(), "gpg exports no key `{}`", self.name);
        fs::write(folder.join(KEY), key)?;
        // The signature is what hosts trust, so it comes last.
        fs::rename(&new, folder.join("InRelease"))
            .with_context(|| format!("cannot replace InRelease in {}", folder.display()))
    }
}

/// Adds the packages for each supported kernel in the archive to the repository in `out`, and signs it. `url` is where
/// hosts will find the folder.
pub(crate) fn make(out: &Path, key: &SigningKey<'_>, url: Option<&str>) -> Result<()> {
    key.check()?;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = out.canonicalize()?;
    let mut made = Vec::new();
    for series in kernel::SERIES {
        if !kernel::offered(series)? {
            eprintln!("no packages for Linux {series}: the archive has no stock kernel of it now");
            continue;
        }
        // A process builds for one kernel only.
        let mut package = Command::new(std::env::current_exe()?);
        package.args(["--kernel", series, "package", "--out"]);
        run::shown(package.arg(&out))?;
        made.push(*series);
    }
    if made.is_empty() {
        bail!(
            "the archive has a stock kernel of none of these series: {}",
            kernel::SERIES.join(", ")
        );
    }
    let here = format!("file:{}", out.display());
    sign(&out, key, url.unwrap_or(&here))
}

/// Makes the index of the packages in a folder that hosts find at `url`, and signs it.
pub(crate) fn sign(folder: &Path, key: &SigningKey<'_>, url: &str) -> Result<()> {
    fs::write(folder.join(SOURCES), sources(url))?;
    let root = Root::new(&artifacts::package_root()?).bind(folder, "/mnt/a");
    run::logged(&mut root.script(INDEX), &folder.with_extension("log"))?;
    key.sign(folder)
}

/// Returns the entry for `/etc/apt/sources.list.d`.
fn sources(url: &str) -> String {
    format!("Types: deb\nURIs: {url}\nSuites: ./\nSigned-By: /etc/apt/keyrings/{KEY}\n")
}

/// Makes a key without a password in a new folder, for tests.
pub(crate) fn key_for_tests(home: &Path) -> Result<SigningKey<'_>> {
    use std::os::unix::fs::PermissionsExt;
    if home.exists() {
        run::remove_tree(home)?;
    }
    fs::create_dir_all(home)?;
    fs::set_permissions(home, fs::Permissions::from_mode(0o700))?;
    let key = SigningKey {
        name: "repository@tests.invalid",
        home: Some(home),
    };
    let mut make = key.gpg();
    make.args(["--passphrase", "", "--quick-generate-key", key.name]);
    run::output(make.args(["default", "default", "never"]))?;
    Ok(key)
}
