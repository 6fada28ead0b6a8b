// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the parent's name in the descriptor.

use super::descriptor::{self, Descriptor, NO_PARENT};
use super::read_descriptor;
use crate::field::{failed, refused};
use crate::{storage, Storage};
use control::Failure;
use diskio::Bytes;

/// Changes the name of the parent, and the identity of its content. The image must not be in use.
///
/// Overwrites the descriptor with one call, because a VMDK has no second place for it: copy it first if the host may lose
/// its power meanwhile.
///
/// # Errors
/// The image has no parent, there is no room for the name, or the storage fails.
pub async fn set_parent(storage: &impl Storage, name: &str, cid: u32) -> Result<(), Failure> {
    let (old, at, header) = read_descriptor(storage).await?;
    if old.parent_cid == NO_PARENT {
        return Err(refused("the VMDK has no parent: make a new image over one"));
    }
    if name.contains(['"', '\n', '\r', '\0']) {
        return Err(Failure::invalid(format!(
            "a VMDK cannot name its parent {name:?}: rename that"
        )));
    }
    let reading = failed("cannot read the VMDK's descriptor");
    let length = storage
        .size()
        .map_err(failed("cannot see the image's size"))?;
    let room = match &header {
        Some(header) => header.descriptor.1 * 512,
        None => length.min(descriptor::MOST),
    };
    // CAST: it was checked to be small.
    let bytes = storage::bytes(storage, at, room as usize)
        .await
        .map_err(reading)?;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
    let mut new = renamed(text, name, cid);
    let parsed = Descriptor::parse(&new)?;
    if parsed.parent.as_deref() != Some(name) || parsed.parent_cid != cid {
        return Err(refused(
            "the VMDK's descriptor cannot store the name, because it is not in UTF-8: rename the parent",
        ));
    }
    let is_inside = new.len() as u64 <= room;
    match header {
        Some(_) if !is_inside => {
            return Err(refused(format!(
                "the VMDK's descriptor has room for {room} bytes, and with the name it has {}: use a shorter one, such as \
                 one in the same folder",
                new.len()
            )))
        }
        // Zeroes end the text.
        Some(_) => new.resize(bytes.len(), 0),
        None if new.len() < bytes.len() => new.resize(bytes.len(), b'\n'),
        None => {}
    }
    // A text ends with its last line.
    let storage = storage.keep_size();
    let storage = storage.map_err(failed("cannot use the image"))?;
    let work = async {
        storage.write(at, Bytes::copied(&new)?).await?;
        storage.flush().await
    };
    work.await
        .map_err(failed("cannot write the VMDK's descriptor"))
}

/// A descriptor with another parent: all other lines stay as they are.
fn renamed(text: &[u8], name: &str, cid: u32) -> Vec<u8> {
    let lines = text.split(|byte| *byte == b'\n').map(|line| {
        let is = |key: &str| {
            let rest = line.trim_ascii_start().strip_prefix(key.as_bytes());
            rest.is_some_and(|rest| rest.trim_ascii_start().starts_with(b"="))
        };
        let end = if line.ends_with(b"\r") { "\r" } else { "" };
        if is("parentCID") {
            format!("parentCID={cid:08x}{end}").into_bytes()
        } else if is("parentFileNameHint") {
            format!("parentFileNameHint=\"{name}\"{end}").into_bytes()
        } else {
            line.to_vec()
        }
    });
    let lines: Vec<Vec<u8>> = lines.collect();
    lines.join(&b'\n')
}

#[cfg(test)]
mod tests {
    use super::renamed;

    #[test]
    fn other_lines_stay() {
        let text = "version=1\r\nCID=1\r\nparentCID=00000007\r\n parentFileNameHint = \"C:\\a.vmdk\"\r\nx=\"parentCID=2\"\n";
        let new = renamed(text.as_bytes(), "/b=c.vmdk", 0xab);
        let expected = "version=1\r\nCID=1\r\nparentCID=000000ab\r\nparentFileNameHint=\"/b=c.vmdk\"\r\nx=\"parentCID=2\"\n";
        assert_eq!(new, expected.as_bytes());
    }
}
