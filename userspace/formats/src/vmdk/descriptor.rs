// SPDX-License-Identifier: MIT OR Apache-2.0
//! The text that describes a VMDK: in a file of its own, or at the beginning of the only one.

use crate::field::refused;
use control::Failure;
use std::borrow::Cow;
use std::ops::Range;

/// Bytes that a descriptor may have.
pub(crate) const MOST: u64 = 256 << 10;
/// Extents that a disk may have.
const EXTENTS: usize = 2048;
/// Identity that means "no parent".
pub(crate) const NO_PARENT: u32 = u32::MAX;

/// A descriptor that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) kind: String,
    /// Identity of the content, which changes with the content, and that of the parent.
    pub(crate) cid: u32,
    pub(crate) parent_cid: u32,
    /// Range of the digits of `cid` in the text. Other programs write as few digits as it needs.
    pub(crate) cid_at: Option<Range<usize>>,
    pub(crate) parent: Option<String>,
    pub(crate) extents: Vec<ExtentLine>,
}

/// A line of the list of extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExtentLine {
    pub(crate) read_only: bool,
    pub(crate) sectors: u64,
    pub(crate) body: ExtentBody,
}

/// Location of an extent's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ExtentBody {
    /// Sectors of a file, from one on.
    Flat { name: String, first: u64 },
    /// A file that knows which of its grains exist.
    Sparse { name: String },
    /// Nothing: it is zero.
    Zero,
}

impl Descriptor {
    /// Returns true if it looks like a descriptor: comments, of which VMware's first names the kind of file, and then a
    /// version.
    pub(crate) fn is_one(bytes: &[u8]) -> bool {
        let mut lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let is_said = |line: &[u8]| {
            line.strip_prefix(b"#")
                .is_some_and(|text| text.trim_ascii_start().starts_with(b"Disk Descriptor"))
        };
        let is_comment = |line: &[u8]| line.is_empty() || line.starts_with(b"#");
        lines.find_map(|line| match line {
            line if is_said(line) => Some(true),
            line if is_comment(line) => None,
            line => {
                let rest = line.strip_prefix(b"version").map(<[u8]>::trim_ascii_start);
                Some(rest.is_some_and(|rest| rest.starts_with(b"=")))
            }
        }) == Some(true)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let is_cut = bytes.len() as u64 >= MOST && !bytes.contains(&0);
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
        if !Self::is_one(bytes) {
            return Err(refused("the VMDK's descriptor does not begin as one does: it is damaged, or this is no VMDK"));
        }
        if is_cut {
            return Err(refused(format!(
                "the VMDK's descriptor has {} KiB or more: convert it",
                MOST >> 10
            )));
        }
        let mut found = Self {
            kind: String::new(),
            cid: 0,
            parent_cid: NO_PARENT,
            cid_at: None,
            parent: None,
            extents: Vec::new(),
        };
        let encoding = Encoding::of(bytes);
        let mut at = 0;
        for line in bytes.split(|byte| *byte == b'\n') {
            found.line(&encoding, at, line)?;
            at += line.len() + 1;
        }
        if found.kind.is_empty() {
            return Err(refused(
                "the VMDK's descriptor has no createType: it is damaged",
            ));
        }
        found.check_names()?;
        Ok(found)
    }

    /// No byte of a file is named twice: two parts of the disk would be one, each with a map of its own.
    fn check_names(&self) -> Result<(), Failure> {
        let parts = self.extents.iter();
        let mut ranges: Vec<(&str, u64, u64)> = parts
            .filter_map(|part| match &part.body {
                ExtentBody::Flat { name, first } => {
                    Some((name.as_str(), *first, first.saturating_add(part.sectors)))
                }
                ExtentBody::Sparse { name } => Some((name.as_str(), 0, u64::MAX)),
                ExtentBody::Zero => None,
            })
            .collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if let [(one, _, end), (other, begin, _)] = pair {
                if one == other && begin < end {
                    return Err(refused(format!(
                        "the VMDK names {one} for two of its extents: it is damaged"
                    )));
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, encoding: &Encoding, at: usize, line: &[u8]) -> Result<(), Failure> {
        let text = encoding.decode(line);
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            return Ok(());
        }
        // Before anything else: the name of a file may have any character in it.
        if let Some(part) = part(text)? {
            encoding.check(line)?;
            if self.extents.len() >= EXTENTS {
                return Err(refused(format!(
                    "the VMDK has more than {EXTENTS} extents: convert it"
                )));
            }
            self.extents.push(part);
            return Ok(());
        }
        let Some((name, value)) = text.split_once('=') else {
            return Ok(());
        };
        let value = value.trim().trim_matches('"');
        match name.trim() {
            "version" if !matches!(value, "1" | "2" | "3") => {
                return Err(refused(format!(
                    "the VMDK has version {value}, which this program does not support"
                )))
            }
            "CID" => {
                self.cid = number(value)?;
                let place = line.iter().position(|byte| *byte == b'=').unwrap_or(0) + 1;
                let rest = line.get(place..).unwrap_or(&[]).iter();
                let digits = rest.take_while(|byte| byte.is_ascii_hexdigit()).count();
                let begin = at + place;
                self.cid_at = (1..=8).contains(&digits).then_some(begin..begin + digits);
            }
            "parentCID" => self.parent_cid = number(value)?,
            "createType" => self.kind = value.to_string(),
            "parentFileNameHint" => {
                encoding.check(line)?;
                self.parent = Some(value.to_string());
            }
            _ => {}
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> Result<u64, Failure> {
        let sectors = self
            .extents
            .iter()
            .try_fold(0_u64, |sum, part| sum.checked_add(part.sectors));
        let size = sectors.and_then(|sectors| sectors.checked_mul(512));
        let size = size.filter(|size| *size > 0 && i64::try_from(*size).is_ok());
        size.ok_or_else(|| refused("the extents of the VMDK have no size that makes a disk"))
    }
}

fn number(text: &str) -> Result<u32, Failure> {
    let digits = text.trim();
    u32::from_str_radix(digits, 16).map_err(|_| {
        refused(format!(
            "the VMDK's descriptor has {digits} where a number belongs"
        ))
    })
}

/// Encoding of a descriptor. All of it that matters is ASCII, except for the names of files.
#[derive(Debug)]
enum Encoding {
    Utf8,
    /// ISO-8859-1, or that of Windows, which has letters in place of some control characters.
    Western,
    /// Its name. Bytes of ASCII mean themselves in all that VMware writes, or are the second byte of a character and
    /// then neither a quote, a sign of equality, a space nor the end of a line.
    Other(String),
}

/// Characters of windows-1252 in place of the control characters of ISO-8859-1.
const WINDOWS: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

impl Encoding {
    /// Returns the encoding that the descriptor names; UTF-8 if it names none.
    fn of(bytes: &[u8]) -> Self {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let name = lines.find_map(|line| {
            let text = String::from_utf8_lossy(line);
            let (name, value) = text.split_once('=')?;
            let value = value.trim().trim_matches('"');
            (name.trim() == "encoding").then(|| value.to_string())
        });
        match name.map(|name| (name.to_ascii_lowercase(), name)) {
            None => Self::Utf8,
            Some((low, name)) => match low.as_str() {
                "utf-8" | "utf8" | "us-ascii" => Self::Utf8,
                "iso-8859-1" | "windows-1252" => Self::Western,
                _ => Self::Other(name),
            },
        }
    }

    fn decode<'b>(&self, line: &'b [u8]) -> Cow<'b, str> {
        match self {
            Self::Western if !line.is_ascii() => {
                let char = |byte: &u8| match byte {
                    0x80..=0x9f => WINDOWS[usize::from(byte - 0x80)],
                    byte => char::from(*byte),
                };
                line.iter().map(char).collect()
            }
            _ => String::from_utf8_lossy(line),
        }
    }

    /// Refuses a line with the name of a file that cannot be decoded.
    fn check(&self, line: &[u8]) -> Result<(), Failure> {
        let is_known = match self {
            Self::Utf8 => std::str::from_utf8(line).is_ok(),
            Self::Western => true,
            Self::Other(_) => line.is_ascii(),
        };
        match (is_known, self) {
            (true, _) => Ok(()),
            (false, Self::Other(name)) => Err(refused(format!(
                "the VMDK names a file in {name}, which cannot be decoded: give the file a name in ASCII, and write that into the descriptor"
            ))),
            (false, _) => Err(refused(
                "the VMDK names a file and not in UTF-8, and says nothing of another encoding: give the file a name in ASCII, and write that into the descriptor",
            )),
        }
    }
}

/// Parses a line such as `RW 4192256 SPARSE "a-s001.vmdk"`; `None` for other lines. Text behind it is ignored.
fn part(text: &str) -> Result<Option<ExtentLine>, Failure> {
    let (access, rest) = word(text);
    let (sectors, rest) = word(rest);
    let (kind, rest) = word(rest);
    let read_only = match access {
        "RW" => false,
        "RDONLY" => true,
        "NOACCESS" => {
            return Err(refused(format!(
                "an extent of the VMDK may not be used: {text}"
            )))
        }
        _ if is_extent(sectors, kind) => {
            return Err(refused(format!(
                "an extent of the VMDK has the access {access}, which this program does not support: {text}"
            )))
        }
        _ => return Ok(None),
    };
    let wrong = || {
        refused(format!(
            "the VMDK's descriptor has a line that is no extent: {text}"
        ))
    };
    let sectors = sectors.parse().map_err(|_| wrong())?;
    let body = match kind {
        "" => return Err(wrong()),
        "ZERO" => ExtentBody::Zero,
        "FLAT" | "VMFS" => {
            let (name, rest) = name(rest).ok_or_else(wrong)?;
            let first = match word(rest).0 {
                "" => 0,
                first => first.parse().map_err(|_| wrong())?,
            };
            ExtentBody::Flat { name, first }
        }
        // ESXi's have other names for other headers, which say what they are.
        "SPARSE" | "VMFSSPARSE" | "SESPARSE" => ExtentBody::Sparse {
            name: name(rest).ok_or_else(wrong)?.0,
        },
        other => {
            return Err(refused(format!(
                "the VMDK has an extent of type {other}, which cannot be served: convert it to monolithicSparse or monolithicFlat"
            )))
        }
    };
    Ok(Some(ExtentLine {
        read_only,
        sectors,
        body,
    }))
}

/// Returns the first word, and the text behind it and its spaces.
fn word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace)
        .map_or((text, ""), |(word, rest)| (word, rest.trim_start()))
}

/// Its second and third word look like those of an extent.
fn is_extent(sectors: &str, kind: &str) -> bool {
    let is_number = !sectors.is_empty() && sectors.bytes().all(|byte| byte.is_ascii_digit());
    is_number && !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_uppercase())
}

/// Returns a name in quotes, and the text after it.
fn name(text: &str) -> Option<(String, &str)> {
    let (name, rest) = text.strip_prefix('"')?.split_once('"')?;
    (!name.is_empty()).then(|| (name.to_string(), rest.trim()))
}

/// A descriptor for new images.
pub(crate) fn spelled(
    kind: &str,
    cid: u32,
    parent: Option<(&str, u32)>,
    extents: &[String],
    sectors: u64,
) -> String {
    let parent_cid = parent.map_or(NO_PARENT, |(_, cid)| cid);
    let hint = parent.map_or(String::new(), |(name, _)| {
        format!("parentFileNameHint=\"{name}\"\n")
    });
    let cylinders = sectors / (63 * 16);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent_cid:08x}\ncreateType=\"{kind}\"\n{hint}\n\
         # Extent description\n{}\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\n",
        extents.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::{spelled, Descriptor, ExtentBody};

    #[test]
    fn what_is_written_is_read() {
        let extents = [
            "RW 100 FLAT \"a b-f001.vmdk\" 7",
            "RDONLY 28 SPARSE \"c.vmdk\"",
            "RW 5 ZERO",
        ];
        let text = spelled(
            "custom",
            0xab12,
            Some(("base.vmdk", 7)),
            &extents.map(String::from),
            133,
        );
        let found = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!(
            (found.cid, found.parent_cid, found.kind.as_str()),
            (0xab12, 7, "custom")
        );
        assert_eq!(found.parent.as_deref(), Some("base.vmdk"));
        assert_eq!(found.size(), Ok(133 * 512));
        assert_eq!(&text[found.cid_at.unwrap()], "0000ab12");
        for (digits, at) in [("ab12", true), ("b", true), (" ab12", false)] {
            let others = text.replace("CID=0000ab12", &format!("CID={digits}"));
            let found = Descriptor::parse(others.as_bytes()).unwrap();
            let place = found.cid_at.map(|place| &others[place]);
            assert_eq!(place, at.then_some(digits));
        }
        let flat = ExtentBody::Flat {
            name: "a b-f001.vmdk".into(),
            first: 7,
        };
        assert_eq!(found.extents[0].body, flat);
        assert!(found.extents[1].read_only && found.extents[2].body == ExtentBody::Zero);
    }

    fn parsed(text: &[u8]) -> Result<Vec<ExtentBody>, control::Failure> {
        let found = Descriptor::parse(text)?;
        Ok(found.extents.into_iter().map(|part| part.body).collect())
    }

    fn flat(name: &str, first: u64) -> ExtentBody {
        let name = name.into();
        ExtentBody::Flat { name, first }
    }

    /// As VMware, VirtualBox and QEMU read them.
    #[test]
    fn lines_of_others_are_understood() {
        let good = spelled("monolithicFlat", 1, None, &["RW 1 ZERO".into()], 1);
        for (line, body) in [
            ("RW 1 FLAT \"a=b-f001.vmdk\" 0", flat("a=b-f001.vmdk", 0)),
            ("RW 1 FLAT \"=\"", flat("=", 0)),
            ("RW  1 \t FLAT   \"a  b\"   7", flat("a  b", 7)),
            (
                "RW 1 FLAT \"a\" 63 partitionUUID 01020304 device=x",
                flat("a", 63),
            ),
            ("  RW 1 VMFS \"a\"\r", flat("a", 0)),
        ] {
            let text = good.replace("RW 1 ZERO", line);
            assert_eq!(parsed(text.as_bytes()), Ok(vec![body]), "{line}");
        }
        for head in [
            "# Disk Descriptor File",
            "#Disk DescriptorFile",
            "# made by a script\n\n# Disk DescriptorFile",
            "# made by a script",
            "",
        ] {
            let text = good.replace("# Disk DescriptorFile", head);
            assert_eq!(
                parsed(text.as_bytes()),
                Ok(vec![ExtentBody::Zero]),
                "{head}"
            );
        }
        for wrong in ["x", "# made by a script\nname=1", "versions=1"] {
            let text = good.replace("# Disk DescriptorFile", wrong);
            assert!(parsed(text.as_bytes()).is_err(), "{wrong}");
        }
        // Text behind the limit would be ignored, and a part of the disk with it.
        let long = "#".repeat(super::MOST as usize);
        let text = good.replace("RW 1 ZERO", &long);
        let bytes = &text.as_bytes()[..super::MOST as usize];
        assert!(parsed(bytes).unwrap_err().message.contains("256 KiB"));
    }

    #[test]
    fn names_are_in_the_encoding_of_the_descriptor() {
        let of = |encoding: &str, name: &[u8]| {
            let line = "RW 1 FLAT \"NAME\" 0";
            let text = spelled("monolithicFlat", 1, None, &[line.into()], 1);
            let text = text.replace("CID=", &format!("encoding=\"{encoding}\"\nCID="));
            let (before, after) = text.split_once("NAME").unwrap();
            parsed(&[before.as_bytes(), name, after.as_bytes()].concat())
        };
        for encoding in [
            "GBK",
            "Shift_JIS",
            "ISO-8859-1",
            "windows-1252",
            "UTF-8",
            "Big5",
        ] {
            assert_eq!(of(encoding, b"a.vmdk"), Ok(vec![flat("a.vmdk", 0)]));
        }
        assert_eq!(of("utf-8", "ä".as_bytes()), Ok(vec![flat("ä", 0)]));
        assert_eq!(of("ISO-8859-1", b"\xe4"), Ok(vec![flat("ä", 0)]));
        assert_eq!(of("windows-1252", b"\x80\xdf"), Ok(vec![flat("€ß", 0)]));
        // A character whose second byte is a backslash in GBK, and one that is no UTF-8.
        for (encoding, name) in [("GBK", &b"\x81\x5c"[..]), ("UTF-8", b"\xe4")] {
            let failure = of(encoding, name).unwrap_err();
            assert!(failure.message.contains("ASCII"), "{failure}");
        }
        // Elsewhere it does not matter.
        let text = spelled("monolithicFlat", 1, None, &["RW 1 ZERO".into()], 1);
        let text = [
            b"encoding=\"GBK\"\nddb.comment = \"\x81\x5c\"\n",
            text.as_bytes(),
        ]
        .concat();
        let text = [&b"# Disk DescriptorFile\n"[..], &text].concat();
        assert_eq!(parsed(&text), Ok(vec![ExtentBody::Zero]));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let good = spelled("monolithicFlat", 1, None, &["RW 1 ZERO".into()], 1);
        assert!(Descriptor::parse(good.as_bytes()).is_ok());
        for (from, to) in [
            ("# Disk DescriptorFile\nversion", "# Dusk\nvorsion"),
            ("version=1", "version=9"),
            ("CID=00000001", "CID=x"),
            ("RW 1 ZERO", "RW x ZERO"),
            ("RW 1 ZERO", "RW 1"),
            ("RW 1 ZERO", "RW 1 STRANGE \"a\""),
            ("RW 1 ZERO", "RW 1 FLAT a 0"),
            ("RW 1 ZERO", "RW 1 FLAT \"a\" b"),
            ("RW 1 ZERO", "NOACCESS 1 ZERO"),
            ("RW 1 ZERO", "RO 1 FLAT \"a\" 0"),
            ("createType", "createTipe"),
        ] {
            assert!(
                Descriptor::parse(good.replacen(from, to, 1).as_bytes()).is_err(),
                "{to}"
            );
        }
        let huge = good.replace("RW 1 ZERO", "RW 18446744073709551615 ZERO\nRW 1 ZERO");
        assert!(Descriptor::parse(huge.as_bytes()).unwrap().size().is_err());
    }
}
