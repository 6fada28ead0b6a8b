// SPDX-License-Identifier: MIT OR Apache-2.0
//! Certificates and keys of an export that is encrypted.

use super::bed::{test, Bed};
use super::fd_broker::{ask, refused};
use super::keys::{allow, assert_has_to_be_a_secret};
use control::supervisor::Create;
use control::tapdisk::{Open, RequestedFile};
use control::{Target, TlsFile};
use rustix::fs::{chown, Uid};
use std::fs;
use std::path::PathBuf;

/// The files of an export, all of them.
struct Files {
    authorities: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Files {
    fn new(bed: &Bed) -> Files {
        let key = bed.image("key.pem", "key.pem");
        allow(&key, 0o600);
        Files {
            authorities: bed.image("ca.pem", "ca.pem"),
            certificate: bed.image("cert.pem", "cert.pem"),
            key,
        }
    }

    /// An export that names all of them.
    fn all(&self) -> Target {
        target(&format!(
            "tls-ca={},tls-cert={},tls-key={},",
            self.authorities.display(),
            self.certificate.display(),
            self.key.display()
        ))
    }

    /// One that shows its server nothing.
    fn only_authorities(&self) -> Target {
        target(&format!("tls-ca={},", self.authorities.display()))
    }
}

fn target(words: &str) -> Target {
    let text = format!("{words}nbd://localhost/a");
    text.parse().expect("a target")
}

fn need(target: &Target, file: TlsFile) -> RequestedFile {
    RequestedFile::Credential {
        target: target.clone(),
        file,
    }
}

fn create(bed: &Bed, target: &Target) -> Create {
    Create {
        open: Open::new(target.clone()),
        ..bed.create("a.img")
    }
}

/// The files of TLS are those that the disk's target names, and no others.
#[test]
fn certificates_are_those_that_the_configuration_names() {
    test("needs-tls", |bed| async move {
        let files = Files::new(&bed);
        let (full, some) = (files.all(), files.only_authorities());
        ask(&bed, "ask", &TlsFile::ALL.map(|file| need(&full, file)));
        let before = bed.log().len();
        let minor = bed.made(create(&bed, &full)).await;
        let given = ["ca.pem", "cert.pem", "key.pem"].map(|name| format!("given {name} Shared"));
        assert_eq!(bed.log()[before..][1..4], given);
        bed.destroy(minor).await;
        // Not those of another disk, nor what this one has not.
        for (wanted, why) in [
            (need(&full, TlsFile::Key), "is not served from tls-ca="),
            (need(&some, TlsFile::Key), "does not say tls-key="),
        ] {
            ask(&bed, "ask", &[wanted]);
            let told = refused(&bed, create(&bed, &some)).await;
            assert!(told.contains(why), "{told}");
        }
        // The message names a file that is missing, or that is no file.
        ask(&bed, "ask", &[need(&some, TlsFile::Authorities)]);
        let ca = &files.authorities;
        let names = format!("{}, which tls-ca= names", ca.display());
        fs::remove_file(ca).expect("remove");
        let told = refused(&bed, create(&bed, &some)).await;
        assert!(told.contains(&names), "{told}");
        fs::create_dir(ca).expect("a folder");
        let told = refused(&bed, create(&bed, &some)).await;
        assert!(told.contains("no regular file"), "{told}");
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_others_may_read_or_change_is_no_key_of_a_certificate() {
    test("tls-mode", |bed| async move {
        let files = Files::new(&bed);
        let full = files.all();
        ask(&bed, "ask", &[need(&full, TlsFile::Key)]);
        assert_has_to_be_a_secret(&bed, &files.key, "tls-key=", || create(&bed, &full)).await;
        // Certificates are no secrets.
        allow(&files.certificate, 0o644);
        ask(&bed, "ask", &[need(&full, TlsFile::Certificate)]);
        let minor = bed.made(create(&bed, &full)).await;
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

/// A user who can change the file of the authorities decides which servers a disk trusts.
#[test]
fn what_others_may_change_is_not_believed() {
    test("tls-changed", |bed| async move {
        let files = Files::new(&bed);
        let full = files.all();
        for (file, path) in [
            (TlsFile::Authorities, &files.authorities),
            (TlsFile::Certificate, &files.certificate),
        ] {
            ask(&bed, "ask", &[need(&full, file)]);
            let names = format!("{}, which {}= names", path.display(), file.word());
            let refuses = async |why: &str| {
                let told = refused(&bed, create(&bed, &full)).await;
                assert!(told.contains(&names) && told.contains(why), "{told}");
            };
            for mode in [0o646, 0o664, 0o602, 0o620] {
                allow(path, mode);
                refuses("chmod go-w").await;
            }
            for mode in [0o644, 0o444, 0o600] {
                allow(path, mode);
                let minor = bed.made(create(&bed, &full)).await;
                bed.destroy(minor).await;
            }
            chown(path, Some(Uid::from_raw(65534)), None).expect("tests are root's");
            refuses("belongs to the user 65534").await;
            chown(path, Some(Uid::ROOT), None).expect("tests are root's");
        }
        bed.assert_nothing_left().await;
    });
}
