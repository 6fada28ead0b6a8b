// SPDX-License-Identifier: MIT OR Apache-2.0
//! The text that says what a VMDK is: in a file of its own, or at the beginning of the only one.

use crate::field::refused;
use control::Failure;
use std::ops::Range;

/// Bytes that a descriptor may have.
pub(crate) const MOST: u64 = 256 << 10;
/// Extents that a disk may have.
const EXTENTS: usize = 2048;
/// The identity of nobody.
pub(crate) const NO_PARENT: u32 = u32::MAX;

/// A descriptor that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) kind: String,
    /// What changes when the content does, and that of the parent.
    pub(crate) cid: u32,
    pub(crate) parent_cid: u32,
    /// Where in the text the digits of `cid` are. Others write as few as it needs.
    pub(crate) cid_at: Option<Range<usize>>,
    pub(crate) parent: Option<String>,
    pub(crate) extents: Vec<Part>,
}

/// A line of the list of extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) read_only: bool,
    pub(crate) sectors: u64,
    pub(crate) body: Body,
}

/// What holds an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// Sectors of a file, from one on.
    Flat { name: String, first: u64 },
    /// A file that knows which of its grains exist.
    Sparse { name: String },
    /// Nothing: it is zero.
    Zero,
}

impl Descriptor {
    /// True if it looks like one.
    pub(crate) fn is_one(bytes: &[u8]) -> bool {
        let text = bytes.trim_ascii_start();
        text.starts_with(b"# Disk DescriptorFile") || text.starts_with(b"#Disk DescriptorFile")
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
        if !Self::is_one(bytes) {
            return Err(refused("the VMDK's descriptor does not begin as one does: it is damaged, or this is no VMDK"));
        }
        let mut found = Self {
            kind: String::new(),
            cid: 0,
            parent_cid: NO_PARENT,
            cid_at: None,
            parent: None,
            extents: Vec::new(),
        };
        let mut at = 0;
        for line in bytes.split(|byte| *byte == b'\n') {
            let text = String::from_utf8_lossy(line);
            found.line(text.trim(), at, line)?;
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
                Body::Flat { name, first } => {
                    Some((name.as_str(), *first, first.saturating_add(part.sectors)))
                }
                Body::Sparse { name } => Some((name.as_str(), 0, u64::MAX)),
                Body::Zero => None,
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

    fn line(&mut self, text: &str, at: usize, line: &[u8]) -> Result<(), Failure> {
        if text.is_empty() || text.starts_with('#') {
            return Ok(());
        }
        if let Some((name, value)) = text.split_once('=') {
            let value = value.trim().trim_matches('"');
            match name.trim() {
                "version" if !matches!(value, "1" | "2" | "3") => {
                    return Err(refused(format!(
                        "the VMDK has version {value}, of which nothing is known"
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
                "parentFileNameHint" => self.parent = Some(value.to_string()),
                "encoding"
                    if !value.eq_ignore_ascii_case("utf-8") && !value.starts_with("windows") =>
                {
                    return Err(refused(format!(
                        "the VMDK's descriptor is in {value}: it must be UTF-8"
                    )))
                }
                _ => {}
            }
            return Ok(());
        }
        if let Some(part) = part(text)? {
            if self.extents.len() >= EXTENTS {
                return Err(refused(format!(
                    "the VMDK has more than {EXTENTS} extents: convert it"
                )));
            }
            self.extents.push(part);
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

/// A line such as `RW 4192256 SPARSE "a-s001.vmdk"`; nothing for other lines.
fn part(text: &str) -> Result<Option<Part>, Failure> {
    let mut words = text.splitn(4, char::is_whitespace);
    let read_only = match words.next() {
        Some("RW") => false,
        Some("RDONLY") => true,
        Some("NOACCESS") => {
            return Err(refused(format!(
                "an extent of the VMDK may not be used: {text}"
            )))
        }
        _ => return Ok(None),
    };
    let wrong = || {
        refused(format!(
            "the VMDK's descriptor has a line that is no extent: {text}"
        ))
    };
    let sectors = words
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or_else(wrong)?;
    let kind = words.next().ok_or_else(wrong)?;
    let rest = words.next().unwrap_or("").trim();
    let body = match kind {
        "ZERO" => Body::Zero,
        "FLAT" | "VMFS" => {
            let (name, first) = name(rest).ok_or_else(wrong)?;
            let first = match first {
                "" => 0,
                first => first.parse().map_err(|_| wrong())?,
            };
            Body::Flat { name, first }
        }
        "SPARSE" => Body::Sparse {
            name: name(rest).ok_or_else(wrong)?.0,
        },
        other => {
            return Err(refused(format!(
                "the VMDK has an extent of type {other}, which cannot be served: convert it to monolithicSparse or monolithicFlat"
            )))
        }
    };
    Ok(Some(Part {
        read_only,
        sectors,
        body,
    }))
}

/// A name in quotes, and what comes after it.
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
    use super::{spelled, Body, Descriptor};

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
        let flat = Body::Flat {
            name: "a b-f001.vmdk".into(),
            first: 7,
        };
        assert_eq!(found.extents[0].body, flat);
        assert!(found.extents[1].read_only && found.extents[2].body == Body::Zero);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let good = spelled("monolithicFlat", 1, None, &["RW 1 ZERO".into()], 1);
        assert!(Descriptor::parse(good.as_bytes()).is_ok());
        for (from, to) in [
            ("# Disk", "# Dusk"),
            ("version=1", "version=9"),
            ("CID=00000001", "CID=x"),
            ("RW 1 ZERO", "RW x ZERO"),
            ("RW 1 ZERO", "RW 1"),
            ("RW 1 ZERO", "RW 1 SESPARSE \"a\""),
            ("RW 1 ZERO", "RW 1 FLAT a 0"),
            ("RW 1 ZERO", "RW 1 FLAT \"a\" b"),
            ("RW 1 ZERO", "NOACCESS 1 ZERO"),
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
