// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The layouts compared with Xen's own headers, as this machine's C compiler sees them.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use ring::abi::{self, Protocol};
use ring::response::{Response, ResponseStatus};

type AbiLayout = BTreeMap<String, i64>;

/// Compiles a file of the suite with the given flags and reads the lines out of the assembler text.
fn c_layout(source: &str, flags: &[&str]) -> Result<AbiLayout, String> {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite");
    let source = suite.join(source);
    let output = Command::new("cc")
        .args(["-std=gnu11", "-ffreestanding", "-S", "-o", "-"])
        .args(flags)
        .arg(&source)
        .output()
        .map_err(|e| format!("cannot run cc, install a C compiler: {e}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cc {flags:?} failed:\n{text}"));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut layout = AbiLayout::new();
    for line in text.lines().filter_map(|l| l.trim().strip_prefix("->")) {
        let (name, value) = line.split_once(' ').ok_or(format!("odd line {line}"))?;
        let value = value
            .parse()
            .map_err(|e| format!("odd value in {line}: {e}"))?;
        layout.insert(name.into(), value);
    }
    Ok(layout)
}

/// Our own layout under the names that `layout.c` uses.
fn our_layout(protocol: Protocol) -> AbiLayout {
    let mut all = vec![
        ("segment.size", size_of::<abi::RawSegment>()),
        ("segment.gref", offset_of!(abi::RawSegment, gref)),
        (
            "segment.first_sect",
            offset_of!(abi::RawSegment, first_sect),
        ),
        ("segment.last_sect", offset_of!(abi::RawSegment, last_sect)),
        ("slot.size", protocol.slot_size()),
        ("sring.req_prod", abi::REQ_PROD),
        ("sring.req_event", abi::REQ_EVENT),
        ("sring.rsp_prod", abi::RSP_PROD),
        ("sring.rsp_event", abi::RSP_EVENT),
        ("sring.ring", abi::RING_HEADER_SIZE),
        ("max.direct", abi::MAX_DIRECT_SEGMENTS),
        ("max.indirect", abi::MAX_INDIRECT_PAGES),
        (
            "segments.page",
            usize::from(abi::SEGMENTS_PER_INDIRECT_PAGE),
        ),
        ("op.read", usize::from(abi::OP_READ)),
        ("op.write", usize::from(abi::OP_WRITE)),
        ("op.barrier", usize::from(abi::OP_WRITE_BARRIER)),
        ("op.flush", usize::from(abi::OP_FLUSH_DISKCACHE)),
        ("op.discard", usize::from(abi::OP_DISCARD)),
        ("op.indirect", usize::from(abi::OP_INDIRECT)),
        ("discard.secure", usize::from(abi::DISCARD_SECURE)),
    ];
    match protocol {
        Protocol::Abi64 => all.extend(requests64()),
        Protocol::Abi32 => all.extend(requests32()),
    }
    let mut layout: AbiLayout = all.into_iter().map(|(n, v)| (n.into(), v as i64)).collect();
    for order in 0..=abi::MAX_RING_ORDER {
        let size = protocol.ring_size(order).expect("an order of the protocol");
        layout.insert(format!("ring.order{order}"), i64::from(size));
    }
    for (name, status) in [
        ("status.okay", ResponseStatus::Okay),
        ("status.error", ResponseStatus::Error),
        ("status.unsupported", ResponseStatus::NotSupported),
    ] {
        layout.insert(name.into(), i64::from(status.to_wire()));
    }
    layout
}

macro_rules! requests {
    ($name:ident, $rw:ident, $discard:ident, $indirect:ident) => {
        fn $name() -> Vec<(&'static str, usize)> {
            vec![
                ("rw.size", size_of::<abi::$rw>()),
                ("rw.operation", offset_of!(abi::$rw, operation)),
                ("rw.nr_segments", offset_of!(abi::$rw, nr_segments)),
                ("rw.handle", offset_of!(abi::$rw, handle)),
                ("rw.id", offset_of!(abi::$rw, id)),
                ("rw.sector_number", offset_of!(abi::$rw, sector_number)),
                ("rw.seg", offset_of!(abi::$rw, seg)),
                ("discard.operation", offset_of!(abi::$discard, operation)),
                ("discard.flag", offset_of!(abi::$discard, flag)),
                ("discard.handle", offset_of!(abi::$discard, handle)),
                ("discard.id", offset_of!(abi::$discard, id)),
                (
                    "discard.sector_number",
                    offset_of!(abi::$discard, sector_number),
                ),
                ("discard.nr_sectors", offset_of!(abi::$discard, nr_sectors)),
                ("indirect.operation", offset_of!(abi::$indirect, operation)),
                (
                    "indirect.indirect_op",
                    offset_of!(abi::$indirect, indirect_op),
                ),
                (
                    "indirect.nr_segments",
                    offset_of!(abi::$indirect, nr_segments),
                ),
                ("indirect.id", offset_of!(abi::$indirect, id)),
                (
                    "indirect.sector_number",
                    offset_of!(abi::$indirect, sector_number),
                ),
                ("indirect.handle", offset_of!(abi::$indirect, handle)),
                (
                    "indirect.indirect_grefs",
                    offset_of!(abi::$indirect, indirect_grefs),
                ),
            ]
        }
    };
}

requests!(requests64, RawRw64, RawDiscard64, RawIndirect64);
requests!(requests32, RawRw32, RawDiscard32, RawIndirect32);

/// The layout of Xen's headers, or `None` after saying what is missing on this machine.
fn xen_layout(name: &str, flags: &[&str]) -> Option<AbiLayout> {
    if !Path::new("/usr/include/xen/io/blkif.h").exists() {
        println!("SKIP {name}: no xen/io/blkif.h, install libxen-dev");
        return None;
    }
    compiled_with(name, "layout.c", flags)
}

/// The layout that a C file prints, or `None` after saying that there is no compiler.
pub(crate) fn compiled(name: &str, source: &str) -> Option<BTreeMap<String, i64>> {
    compiled_with(name, source, &[])
}

fn compiled_with(name: &str, source: &str, flags: &[&str]) -> Option<AbiLayout> {
    if Command::new("cc").arg("--version").output().is_err() {
        println!("SKIP {name}: no cc, install gcc");
        return None;
    }
    Some(c_layout(source, flags).unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Compares one layout, name by name in both directions.
fn compare(name: &str, flags: &[&str], protocol: Protocol) {
    let Some(theirs) = xen_layout(name, flags) else {
        return;
    };
    let ours = our_layout(protocol);
    // Facts about C for which we have no structure.
    let unnamed = |field: &str| {
        field == "indirect.size" || field.starts_with("response.") || field.starts_with("xen.")
    };
    for (field, value) in &theirs {
        if !unnamed(field) {
            assert_eq!(ours.get(field), Some(value), "{name}: {field}");
        }
    }
    for field in ours.keys() {
        assert!(
            theirs.contains_key(field),
            "{name}: {field} is not compared"
        );
    }
    assert!(theirs["indirect.size"] <= theirs["slot.size"]);
    response(&theirs);
}

/// The words of a response hold each field where C has it and zero elsewhere.
fn response(theirs: &AbiLayout) {
    let response = Response {
        id: u64::MAX,
        operation: 0xff,
        status: ResponseStatus::Error,
    };
    let bytes: Vec<u8> = response
        .words()
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    let mut want = [0u8; 16];
    for (field, len) in [("id", 8), ("operation", 1), ("status", 2)] {
        let at = theirs[&format!("response.{field}")] as usize;
        want[at..at + len].fill(0xff);
    }
    assert_eq!(bytes, want);
    assert!(theirs["response.size"] <= 16 && theirs["response.size"] >= 12);
}

#[test]
fn native_layout_is_that_of_xen_headers() {
    compare("native_layout_is_that_of_xen_headers", &[], Protocol::Abi64);
}

#[test]
fn x86_32_layout_is_that_of_a_32_bit_compiler() {
    let name = "x86_32_layout_is_that_of_a_32_bit_compiler";
    if cfg!(target_arch = "x86_64") {
        compare(name, &["-m32"], Protocol::Abi32);
    } else {
        println!("SKIP {name}: the compiler has no -m32 on this machine");
    }
}

#[test]
fn x86_32_layout_is_that_of_packed_fields() {
    let name = "x86_32_layout_is_that_of_packed_fields";
    compare(name, &["-DPACK"], Protocol::Abi32);
}

/// The crate xen-sys has no blkif, but it was generated from the same headers by other means: what
/// both know must agree, or this file reads the headers wrongly.
#[test]
fn headers_agree_with_the_crate_xen_sys() {
    use xen_sys::evtchn_bind_interdomain as Bind;
    let Some(theirs) = xen_layout("headers_agree_with_the_crate_xen_sys", &[]) else {
        return;
    };
    for (field, value) in [
        ("xen.domid", size_of::<xen_sys::domid_t>()),
        ("xen.port", size_of::<xen_sys::evtchn_port_t>()),
        ("xen.bind.size", size_of::<Bind>()),
        ("xen.bind.remote_dom", offset_of!(Bind, remote_dom)),
        ("xen.bind.remote_port", offset_of!(Bind, remote_port)),
        ("xen.bind.local_port", offset_of!(Bind, local_port)),
    ] {
        assert_eq!(theirs[field], value as i64, "{field}");
    }
}

#[test]
fn ring_sizes_follow_from_the_slot_sizes() {
    for protocol in [Protocol::Abi64, Protocol::Abi32] {
        for order in 0..=abi::MAX_RING_ORDER {
            let room = (abi::PAGE_SIZE << order) - abi::RING_HEADER_SIZE;
            let fit = room / protocol.slot_size();
            let size = protocol.ring_size(order).expect("an order of the protocol") as usize;
            assert!(size.is_power_of_two() && size <= fit && fit < 2 * size);
        }
        for order in abi::MAX_RING_ORDER + 1..=u8::MAX {
            assert_eq!(protocol.ring_size(order), None);
        }
    }
}
