// SPDX-License-Identifier: MIT OR Apache-2.0
//! A differencing VHDX's names of its parent: keys and values, some of which are paths of Windows.

use super::guid::Guid;
use crate::field::{le16, le32, refused};
use crate::Parent;
use control::Failure;
use std::collections::BTreeMap;

/// The only kind that is specified: the parent is a VHDX.
const KIND: Guid = Guid(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);
/// Bytes of the header, and of an entry.
const ENTRIES: (usize, usize) = (20, 12);
const LINKAGE: &str = "parent_linkage";
const LINKAGE2: &str = "parent_linkage2";
/// Keys of paths, in the order in which the driver tries them.
const PATHS: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

/// Parses the parent locator.
///
/// # Errors
/// The kind of locator is unknown, or it does not identify the parent's content.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parent, Failure> {
    let kind = Guid::at(bytes, 0);
    if kind != KIND {
        return Err(refused(format!(
            "the parent of the VHDX is of the kind {kind}, and only a VHDX can be one: convert it with the program that made it"
        )));
    }
    let values = values(bytes)?;
    let names = PATHS.iter().filter_map(|key| path(values.get(key)?));
    let linkage = |key: &str| {
        match values.get(key) {
        None => Ok(None),
        Some(text) => match Guid::parse(text) {
            Some(guid) => Ok(Some(guid.to_string())),
            None => Err(refused(format!(
                "the VHDX says {text:?} of its parent's identity ({key}), which is no GUID: it is damaged"
            ))),
        },
    }
    };
    let id = linkage(LINKAGE)?.ok_or_else(|| {
        refused(format!(
            "the VHDX does not say which content its parent has ({LINKAGE}): it is damaged"
        ))
    })?;
    Ok(Parent {
        names: names.collect(),
        driver: Some("vhdx".into()),
        id: Some(id),
        other_id: linkage(LINKAGE2)?,
    })
}

/// The values of the keys that count.
fn values(bytes: &[u8]) -> Result<BTreeMap<&'static str, String>, Failure> {
    let (begin, len) = ENTRIES;
    let count = usize::from(le16(bytes, 18));
    let entries = bytes.get(begin..).unwrap_or(&[]).chunks_exact(len);
    if entries.len() < count {
        return Err(refused(format!(
            "the VHDX's parent locator has no room for its {count} entries: it is damaged"
        )));
    }
    let mut found = BTreeMap::new();
    for entry in entries.take(count) {
        let Some(key) = key(text(bytes, le32(entry, 0), le16(entry, 8))) else {
            continue;
        };
        let value = text(bytes, le32(entry, 4), le16(entry, 10)).and_then(decode);
        let value = value.ok_or_else(|| {
            refused(format!(
                "the {key} in the VHDX's parent locator is not UTF-16 without zeroes: the locator is damaged"
            ))
        })?;
        if found.insert(key, value).is_some() {
            return Err(refused(format!(
                "the VHDX's parent locator has {key} twice: it is damaged"
            )));
        }
    }
    Ok(found)
}

/// The key that these bytes spell, if it is one that counts. No other is decoded: there may be many, and long ones.
fn key(bytes: Option<&[u8]>) -> Option<&'static str> {
    let bytes = bytes?;
    let known = PATHS.into_iter().chain([LINKAGE, LINKAGE2]);
    known.into_iter().find(|key| {
        key.encode_utf16()
            .flat_map(u16::to_le_bytes)
            .eq(bytes.iter().copied())
    })
}

fn text(bytes: &[u8], at: u32, len: u16) -> Option<&[u8]> {
    let at = at as usize;
    bytes.get(at..at.checked_add(usize::from(len))?)
}

fn decode(bytes: &[u8]) -> Option<String> {
    let pairs = bytes.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    let units: Vec<u16> = pairs.map(|pair| le16(pair, 0)).collect();
    let text = String::from_utf16(&units).ok()?;
    (!text.contains('\0')).then_some(text)
}

/// Converts a path of Windows: slashes, and neither a drive nor a volume. A path of a network share is refused, because
/// it leads nowhere here.
fn path(text: &str) -> Option<String> {
    let path = text.replace('\\', "/");
    let (rest, is_extended) = match path.strip_prefix("//?/") {
        Some(rest) => (rest, true),
        None => (path.as_str(), false),
    };
    let volume = rest
        .strip_prefix("Volume{")
        .and_then(|rest| rest.split_once('}'));
    let drive = rest.split_once(':').filter(|(drive, _)| {
        drive.len() == 1 && drive.bytes().all(|byte| byte.is_ascii_alphabetic())
    });
    let path = match (volume.or(drive), is_extended) {
        (Some((_, path)), _) => path,
        (None, false) if !rest.starts_with("//") => rest,
        (None, _) => return None,
    };
    (!path.is_empty()).then(|| path.to_string())
}

#[cfg(test)]
mod tests {
    use super::path;

    #[test]
    fn paths_of_windows_become_ours() {
        for (text, ours) in [
            (".\\base.vhdx", Some("./base.vhdx")),
            ("..\\..\\a b\\bäse.vhdx", Some("../../a b/bäse.vhdx")),
            ("\\\\?\\d:\\vm\\base.vhdx", Some("/vm/base.vhdx")),
            ("C:\\vm\\base.vhdx", Some("/vm/base.vhdx")),
            (
                "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\vm\\base.vhdx",
                Some("/vm/base.vhdx"),
            ),
            ("/srv/base.vhdx", Some("/srv/base.vhdx")),
            ("\\\\?\\Server\\Share\\base.vhdx", None),
            ("\\\\Server\\Share\\base.vhdx", None),
            ("C:", None),
            ("", None),
        ] {
            assert_eq!(path(text).as_deref(), ours, "{text}");
        }
    }
}
