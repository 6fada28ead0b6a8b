// SPDX-License-Identifier: MIT OR Apache-2.0
//! Certificates and keys of an export that is encrypted.

use super::bed::test;
use super::needs::{ask, refused};
use control::supervisor::Create;
use control::tapdisk::{Needed, Open};
use control::{Target, TlsFile};
use std::fs;

/// The files of TLS are those that the disk's target names, and no others.
#[test]
fn certificates_are_those_that_the_configuration_names() {
    test("needs-tls", |bed| async move {
        let file = |name: &str| bed.image(name, name).display().to_string();
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let target = |words: &str| -> Target {
            let text = format!("{words}nbd://localhost/a");
            text.parse().expect("a target")
        };
        let full = target(&format!("tls-ca={ca},tls-cert={cert},tls-key={key},"));
        let some = target(&format!("tls-ca={ca},"));
        let need = |target: &Target, file| Needed::Credential {
            target: target.clone(),
            file,
        };
        let create = |target: &Target| Create {
            open: Open::new(target.clone()),
            ..bed.create("a.img")
        };
        ask(&bed, "ask", &TlsFile::ALL.map(|file| need(&full, file)));
        let before = bed.log().len();
        let minor = bed.made(create(&full)).await;
        let given = ["ca.pem", "cert.pem", "key.pem"].map(|name| format!("given {name} Shared"));
        assert_eq!(bed.log()[before..][1..4], given);
        bed.destroy(minor).await;
        // Not those of another disk, nor what this one has not.
        for (wanted, why) in [
            (need(&full, TlsFile::Key), "is not served from tls-ca="),
            (need(&some, TlsFile::Key), "does not say tls-key="),
        ] {
            ask(&bed, "ask", &[wanted]);
            let told = refused(&bed, create(&some)).await;
            assert!(told.contains(why), "{told}");
        }
        // What is no file, or not there, is said by its name.
        ask(&bed, "ask", &[need(&some, TlsFile::Authorities)]);
        fs::remove_file(&ca).expect("remove");
        let told = refused(&bed, create(&some)).await;
        assert!(told.contains(&ca) && told.contains("tls-ca="), "{told}");
        fs::create_dir(&ca).expect("a folder");
        let told = refused(&bed, create(&some)).await;
        assert!(told.contains("no regular file"), "{told}");
        bed.assert_nothing_left().await;
    });
}
