// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Stack frames of the module. The file systems and drivers of the disk run in a queue's thread, on its 16 KiB of
//! stack, so no function of the module may use much of it. The tables with which the kernel unwinds the stack have the
//! size of each frame; objtool makes them from the code itself.

use crate::kernel::Dom0Kernel;
use crate::root::Root;
use crate::{artifacts, run};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Maximum number of bytes of stack of a function, with its return address and saved registers.
const MOST: u64 = 1023;

/// Linux's macros generate these functions for trace points, with a copy of the registers for perf and a frame whose
/// size is not in the tables. They run only while perf uses a trace point, and call no function of the module.
const OF_TRACE_POINTS: &str = "perf_trace_";

/// Complains about each function of `module` that uses too much of the stack.
pub(crate) fn check(module: &Path) -> Result<()> {
    let folder = module.parent().context("the module is in a folder")?;
    let name = module
        .file_name()
        .context("the module has a name")?
        .to_string_lossy();
    let file = format!("/mnt/c/{name}");
    let build_root = artifacts::build_root()?;
    let root = Root::new(&build_root)
        .bind_read_only(
            &artifacts::kernel_tree(&build_root, Dom0Kernel::Stock)?,
            "/mnt/a",
        )
        .bind_read_only(folder, "/mnt/c");
    let symbols = run::output(root.command("objdump").args(["--syms", &file]))?;
    let unwinding = run::output(root.command("env").args([
        "SRCARCH=x86",
        "/mnt/a/build/tools/objtool/objtool",
        "--dump=orc",
        &file,
    ]))?;
    super::none(complaints(&unwinding, &symbols, MOST))
}

/// Returns the faults of the frames that objtool's dump describes, for the functions that objdump lists.
fn complaints(orc: &str, symbols: &str, most: u64) -> Vec<String> {
    let functions = functions(symbols);
    let mut largest: BTreeMap<&str, u64> = BTreeMap::new();
    let mut complaints = Vec::new();
    for line in orc.lines().filter(|line| line.contains(":type:")) {
        let place = line.split(":type:").next().and_then(position);
        let name = place
            .and_then(|(section, offset)| functions.get(section)?.range(..=offset).last())
            .map_or("code outside of all functions", |(_, name)| name);
        if name.starts_with(OF_TRACE_POINTS) {
            continue;
        }
        match taken(line) {
            Some(Taken::Nothing) => {}
            Some(Taken::Bytes(bytes)) => {
                let before = largest.entry(name).or_default();
                *before = bytes.max(*before);
            }
            None => complaints.push(format!(
                "this line does not show how much stack is used: {line}"
            )),
        }
    }
    if largest.len() < 2 {
        complaints.push("objtool's dump tells of no functions: it has changed its form".into());
    }
    for (name, bytes) in largest {
        if bytes > most {
            complaints.push(format!(
                "{:#} takes {bytes} bytes of stack, more than {most}: keep what is large on the heap, and do not move it by value",
                rustc_demangle::demangle(name)
            ));
        }
    }
    complaints
}

enum Taken {
    /// There is no code, or code without a frame that the kernel could unwind.
    Nothing,
    Bytes(u64),
}

/// Reads a line such as `.text+1f:type:call sp:sp+24 bp:prevsp-16 signal:0`.
fn taken(line: &str) -> Option<Taken> {
    let (_, entry) = line.split_once(":type:")?;
    let mut words = entry.split_whitespace();
    let kind = words.next()?;
    let sp = words.next()?.strip_prefix("sp:")?;
    if kind == "(und)" && sp == "(und)" {
        return Some(Taken::Nothing);
    }
    sp.strip_prefix("sp+")?.parse().ok().map(Taken::Bytes)
}

/// Returns the section and offset of `.text+1f`.
fn position(place: &str) -> Option<(&str, u64)> {
    let (section, offset) = place.rsplit_once('+')?;
    Some((section, u64::from_str_radix(offset, 16).ok()?))
}

/// Returns the functions in `objdump --syms`, by section and offset.
fn functions(symbols: &str) -> BTreeMap<&str, BTreeMap<u64, &str>> {
    let mut functions: BTreeMap<&str, BTreeMap<u64, &str>> = BTreeMap::new();
    for line in symbols.lines() {
        // The offset, seven columns of flags of which the last is F, the section, the size, the name.
        let Some((address, rest)) = line.split_once(' ') else {
            continue;
        };
        let Some((flags, rest)) = rest.split_at_checked(7) else {
            continue;
        };
        let mut words = rest.split_whitespace();
        let (section, _, name) = (words.next(), words.next(), words.last());
        if let (true, Ok(offset), Some(section), Some(name)) = (
            flags.ends_with('F'),
            u64::from_str_radix(address, 16),
            section,
            name,
        ) {
            functions.entry(section).or_default().insert(offset, name);
        }
    }
    functions
}

#[cfg(test)]
mod tests {
    use super::complaints;

    const SYMBOLS: &str = "
x.ko:     file format elf64-x86-64

SYMBOL TABLE:
0000000000000000 l    d  .text\t0000000000000000 .text
0000000000000000 l     F .text\t0000000000000052 small
0000000000000060 g     F .text\t0000000000000052 0x00 large
0000000000000060 l     F .init.text\t0000000000000052 start
0000000000000000         *UND*\t0000000000000000 memcpy
";

    fn dump(depth: &str) -> String {
        format!(
            ".text+0:type:call sp:sp+8 bp:(und) signal:0\n\
             .text+60:type:call sp:sp+8 bp:(und) signal:0\n\
             .text+6a:type:call sp:{depth} bp:prevsp-16 signal:0\n\
             .text+b0:type:(und) sp:(und) bp:(und) signal:0\n\
             .init.text+60:type:call sp:sp+16 bp:(und) signal:0\n"
        )
    }

    #[test]
    fn small_frames_pass() {
        assert!(complaints(&dump("sp+1023"), SYMBOLS, 1023).is_empty());
    }

    #[test]
    fn planted_frame_is_found_and_named() {
        let found = complaints(&dump("sp+1024"), SYMBOLS, 1023);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("large takes 1024 bytes"), "{found:?}");
    }

    #[test]
    fn frame_of_unknown_size_is_found() {
        assert_eq!(complaints(&dump("bp+16"), SYMBOLS, 1023).len(), 1);
        assert_eq!(complaints(&dump("(sp+8)"), SYMBOLS, 1023).len(), 1);
    }

    #[test]
    fn what_linux_makes_of_trace_points_is_passed_by() {
        let symbols = SYMBOLS.replace("large", "perf_trace_large");
        assert!(complaints(&dump("bp+16"), &symbols, 1023).is_empty());
    }

    #[test]
    fn empty_dump_is_no_pass() {
        assert_eq!(complaints("", SYMBOLS, 1023).len(), 1);
    }
}
