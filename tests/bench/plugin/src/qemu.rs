// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The entry point, and the functions of QEMU's plugin interface (version 4) that are used.

use crate::places::{self, Blocks, COUNTERS, FIXED, MARK};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A translation block: opaque.
enum Block {}
/// An instruction of a block: opaque.
enum Instruction {}
const NO_REGISTERS: c_int = 0;

extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, translated: extern "C" fn(u64, *mut Block));
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut Block,
        executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const Block) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const Block) -> u64;
    fn qemu_plugin_tb_get_insn(block: *const Block, index: usize) -> *mut Instruction;
    fn qemu_plugin_insn_data(
        instruction: *const Instruction,
        place: *mut c_void,
        length: usize,
    ) -> usize;
}

/// The interface that this plugin was written for.
#[no_mangle]
#[allow(unreachable_pub)] // QEMU reaches it by its name.
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 4;

/// The machine has at most so many processors.
const PROCESSORS: usize = 4;

/// There when blocks of modules are to be told apart.
static EACH_BLOCK: OnceLock<Mutex<Blocks>> = OnceLock::new();

/// The file, and how many marks it has.
struct Out {
    file: BufWriter<File>,
    marks: u64,
}

static OUT: OnceLock<Mutex<Out>> = OnceLock::new();
static COUNTS: [[AtomicU64; COUNTERS]; PROCESSORS] =
    [const { [const { AtomicU64::new(0) }; COUNTERS] }; PROCESSORS];

/// Called once by QEMU; `out=FILE` among the arguments names the file of the counters, and `blocks=on`
/// asks for a counter for each block of a module.
///
/// # Safety
/// `argv` holds `argc` strings, as QEMU promises.
#[no_mangle]
#[allow(unreachable_pub)] // QEMU reaches it by its name.
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let arguments: Vec<String> = (0..usize::try_from(argc).unwrap_or(0))
        .map(|index| {
            // SAFETY: QEMU passes that many strings.
            let text = unsafe { CStr::from_ptr(*argv.add(index)) };
            text.to_string_lossy().into_owned()
        })
        .collect();
    if arguments.iter().any(|text| text == "blocks=on") {
        EACH_BLOCK.get_or_init(|| Mutex::new(Blocks::default()));
    }
    let Some(path) = arguments.iter().find_map(|text| text.strip_prefix("out=")) else {
        eprintln!("bench-plugin: give it the argument out=FILE");
        return 1;
    };
    let file = match File::create(path) {
        Ok(file) => file,
        Err(error) => {
            eprintln!("bench-plugin: cannot write {path}: {error}");
            return 1;
        }
    };
    let file = BufWriter::new(file);
    if OUT.set(Mutex::new(Out { file, marks: 0 })).is_err() {
        eprintln!("bench-plugin: it can be loaded once only");
        return 1;
    }
    // SAFETY: the function has the type that QEMU expects.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

/// A block was translated: whenever it runs, its length is added to the counter of its place.
extern "C" fn translated(_id: u64, block: *mut Block) {
    // SAFETY: QEMU passes a block that is valid during this call.
    let (address, count) = unsafe { (qemu_plugin_tb_vaddr(block), qemu_plugin_tb_n_insns(block)) };
    let counter = match EACH_BLOCK.get() {
        Some(blocks) if places::in_module(address) => {
            let mut blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner);
            blocks.counter(address)
        }
        _ => places::counter(address),
    };
    // The number that the other function gets: a block has far less than 2^16 instructions.
    let data = std::ptr::without_provenance_mut(counter << 16 | count);
    // SAFETY: as above; `data` is a number, nobody follows it.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGISTERS, data) };
    if places::NAMES.get(counter) != Some(&"user") {
        return;
    }
    for index in 0..count {
        mark_if_it_is(block, index);
    }
}

fn mark_if_it_is(block: *mut Block, index: usize) {
    let mut bytes = [0u8; MARK.len()];
    // SAFETY: the index is below the number of instructions, and `bytes` has that length.
    unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        let length = qemu_plugin_insn_data(instruction, bytes.as_mut_ptr().cast(), bytes.len());
        if length == MARK.len() && bytes == MARK {
            let nothing = std::ptr::null_mut();
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, NO_REGISTERS, nothing);
        }
    }
}

/// A block is about to run. The processors of a machine that counts instructions take turns, so no
/// addition is lost without a locked one.
extern "C" fn executed(processor: c_uint, data: *mut c_void) {
    let data = data.addr();
    let counts = &COUNTS[processor as usize % PROCESSORS];
    if let Some(count) = counts.get(data >> 16) {
        count.store(count.load(Relaxed) + (data & 0xffff) as u64, Relaxed);
    }
}

/// The mark was executed.
extern "C" fn marked(_processor: c_uint, _data: *mut c_void) {
    let Some(out) = OUT.get() else { return };
    if let Err(error) = dump(&mut out.lock().unwrap_or_else(PoisonError::into_inner)) {
        eprintln!("bench-plugin: cannot write the counters: {error}");
    }
}

fn dump(out: &mut Out) -> std::io::Result<()> {
    writeln!(out.file, "mark {}", out.marks)?;
    out.marks += 1;
    for (processor, counts) in COUNTS.iter().enumerate() {
        let (fixed, blocks) = counts.split_at(FIXED);
        for (counter, count) in fixed.iter().enumerate() {
            line(out, processor, count, || places::name(counter))?;
        }
        let Some(known) = EACH_BLOCK.get() else {
            continue;
        };
        let known = known.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, counter) in known.all() {
            if let Some(count) = blocks.get(counter - FIXED) {
                line(out, processor, count, || format!("{address:x}"))?;
            }
        }
    }
    out.file.flush()
}

/// Writes one counter, unless nothing was counted.
fn line(
    out: &mut Out,
    processor: usize,
    count: &AtomicU64,
    name: impl FnOnce() -> String,
) -> std::io::Result<()> {
    match count.load(Relaxed) {
        0 => Ok(()),
        count => writeln!(out.file, "{processor} {} {count}", name()),
    }
}
