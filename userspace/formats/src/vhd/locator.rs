// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VHD's names of its parent: paths in the notations of several systems, of which tapdisk writes three, all relative.

/// A relative path, as Windows writes it.
pub(crate) const RELATIVE: u32 = 0x5732_7275;
/// An absolute one.
pub(crate) const ABSOLUTE: u32 = 0x5732_6b75;
/// A URL of a file.
pub(crate) const URL: u32 = 0x4d61_6358;
/// Codes of locators that are obsolete, or that are no path.
pub(crate) const OTHERS: [u32; 3] = [0x5769_3272, 0x5769_326b, 0x4d61_6320];

/// The path that a locator of kind `code` holds.
pub(crate) fn decode(code: u32, bytes: &[u8]) -> Option<String> {
    let path = match code {
        URL => {
            let text = std::str::from_utf8(bytes).ok()?;
            text.strip_prefix("file://")?.to_string()
        }
        RELATIVE | ABSOLUTE => from_windows(bytes, u16::from_le_bytes)?,
        _ => return None,
    };
    acceptable(path)
}

/// The name in the header, which is a file name, or a path in images of others.
pub(crate) fn decode_name(bytes: &[u8]) -> Option<String> {
    acceptable(from_windows(bytes, u16::from_be_bytes)?)
}

fn acceptable(path: String) -> Option<String> {
    let path = path.trim_end_matches('\0');
    (!path.is_empty() && !path.contains('\0')).then(|| path.to_string())
}

/// A path of Windows in ours: slashes, and no drive.
fn from_windows(bytes: &[u8], unit: impl Fn([u8; 2]) -> u16) -> Option<String> {
    let units: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|pair| unit([pair[0], pair[1]]))
        .take_while(|unit| *unit != 0)
        .collect();
    let path = String::from_utf16(&units).ok()?.replace('\\', "/");
    let rest = path.strip_prefix("C:").or_else(|| path.strip_prefix("c:"));
    Some(rest.map_or_else(|| path.clone(), str::to_string))
}

/// `path` in the spelling of `code`, as tapdisk writes it.
pub(crate) fn encode(code: u32, path: &str) -> Vec<u8> {
    if code == URL {
        return format!("file://{path}").into_bytes();
    }
    let path = match path.strip_prefix("./") {
        _ if path.starts_with('/') => path.to_string(),
        rest => format!("./{}", rest.unwrap_or(path)),
    };
    let path = path.replace('/', "\\");
    path.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// The last part of `path`, as it is in the header.
pub(crate) fn encode_name(path: &str) -> Vec<u8> {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::{decode, decode_name, encode, encode_name, ABSOLUTE, RELATIVE, URL};

    #[test]
    fn paths_come_back() {
        for path in ["./base.vhd", "../a b/bäse.vhd", "/srv/base.vhd"] {
            assert_eq!(decode(URL, &encode(URL, path)).as_deref(), Some(path));
        }
        let encoded = encode(RELATIVE, "./base.vhd");
        assert_eq!(&encoded[..6], b".\0\\\0b\0");
        assert_eq!(decode(RELATIVE, &encoded).as_deref(), Some("./base.vhd"));
        let windows: Vec<u8> = "C:\\vm\\base.vhd"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect();
        assert_eq!(decode(ABSOLUTE, &windows).as_deref(), Some("/vm/base.vhd"));
        assert_eq!(
            decode_name(&encode_name("/srv/base.vhd")).as_deref(),
            Some("base.vhd")
        );
    }

    #[test]
    fn what_is_no_path_is_none() {
        assert_eq!(decode(URL, b"http://host/a"), None);
        assert_eq!(decode(URL, b"file://"), None);
        assert_eq!(decode(URL, b"file://a\0b"), None);
        assert_eq!(decode(RELATIVE, &[0, 0xd8]), None);
        assert_eq!(decode(7, b"file://a"), None);
        assert_eq!(decode_name(&[0; 512]), None);
    }
}
