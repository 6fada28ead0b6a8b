// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The entry point, and the functions of QEMU's plugin interface (version 4) that are used.
//!
//! Callbacks are told which processor runs, but in a machine whose processors take turns QEMU puts that
//! number into a block when it translates it: of text that all run, such as the hypervisor's, it names
//! the processor that came first. QEMU's own variable is asked instead.

use crate::blocks::{Block as Kind, Length};
use crate::places::{self, Blocks, COUNTERS, FIXED, MARK};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};
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
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// QEMU's variable that names the processor whose turn it is; each thread has one.
const CURRENT: &CStr = c"current_cpu";
/// QEMU's function that finds a processor by its number.
const BY_NUMBER: &CStr = c"qemu_get_cpu";
type ByNumber = unsafe extern "C" fn(c_int) -> *mut c_void;

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
/// What else is counted of a processor.
static OTHERS: [Others; PROCESSORS] = [const { Others::new() }; PROCESSORS];
/// All instructions that were executed, which is the machine's time.
static NOW: AtomicU64 = AtomicU64::new(0);
/// Where the thread that runs all processors has [`CURRENT`], and the processors.
static TURN: AtomicPtr<*mut c_void> = AtomicPtr::new(std::ptr::null_mut());
static KNOWN: [AtomicPtr<c_void>; PROCESSORS] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; PROCESSORS];

/// Of one processor, beside instructions by place.
struct Others {
    /// Bytes that were copied, and the instructions that did it: no place has those.
    copied: AtomicU64,
    copying: AtomicU64,
    /// Instructions of other processors while this one looked for something to do, in a domain.
    polled: AtomicU64,
    /// When it gave its turn away in the middle of that; 0 when it did not.
    paused: AtomicU64,
}

impl Others {
    const fn new() -> Others {
        Others {
            copied: AtomicU64::new(0),
            copying: AtomicU64::new(0),
            polled: AtomicU64::new(0),
            paused: AtomicU64::new(0),
        }
    }
}

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
    // SAFETY: both are names.
    let exported = unsafe {
        let found = |name: &CStr| !dlsym(std::ptr::null_mut(), name.as_ptr()).is_null();
        found(CURRENT) && found(BY_NUMBER)
    };
    if !exported {
        eprintln!("bench-plugin: this QEMU does not say which processor runs: it exports no {CURRENT:?} or {BY_NUMBER:?}");
        return 1;
    }
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

/// A block was translated: whenever it runs, what it does is added to the counters of who runs it.
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
    if TURN.load(Relaxed).is_null() {
        find_processors();
    }
    let kind = Kind::of(
        (0..count).map(|index| instruction(block, index)),
        places::NAMES.get(counter) != Some(&"xen"),
    );
    let data = std::ptr::without_provenance_mut(kind.pack(counter));
    // SAFETY: as above; `data` is a number, nobody follows it.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGISTERS, data) };
    if places::NAMES.get(counter) != Some(&"user") {
        return;
    }
    for index in 0..count {
        mark_if_it_is(block, index);
    }
}

/// The first bytes of an instruction, and how many it has of them.
fn instruction(block: *mut Block, index: usize) -> ([u8; MARK.len()], Length) {
    let mut bytes = [0u8; MARK.len()];
    // SAFETY: the index is below the number of instructions, and `bytes` has that length.
    let length = unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        qemu_plugin_insn_data(instruction, bytes.as_mut_ptr().cast(), bytes.len())
    };
    (bytes, length)
}

fn mark_if_it_is(block: *mut Block, index: usize) {
    if instruction(block, index) != (MARK, MARK.len()) {
        return;
    }
    // SAFETY: the index is below the number of instructions.
    unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        let nothing = std::ptr::null_mut();
        qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, NO_REGISTERS, nothing);
    }
}

/// In the thread that runs the processors, which is the one that translates.
fn find_processors() {
    // SAFETY: `qemu_plugin_install` has found both. The variable lives as long as this thread, and
    // processors are never taken away; the function has this type since QEMU has numbered them.
    unsafe {
        let by_number = dlsym(std::ptr::null_mut(), BY_NUMBER.as_ptr());
        let by_number: ByNumber = std::mem::transmute(by_number);
        for (number, known) in (0..).zip(&KNOWN) {
            known.store(by_number(number), Relaxed);
        }
        let turn = dlsym(std::ptr::null_mut(), CURRENT.as_ptr());
        TURN.store(turn.cast(), Relaxed);
    }
}

/// The number of the processor whose turn it is.
fn processor() -> usize {
    // SAFETY: `find_processors` came before the first block that is executed, in this thread.
    let current = unsafe { *TURN.load(Relaxed) };
    KNOWN
        .iter()
        .position(|known| known.load(Relaxed) == current)
        .unwrap_or(0)
}

/// Adds without a locked instruction: the processors take turns in one thread.
fn add(count: &AtomicU64, more: u64) {
    count.store(count.load(Relaxed) + more, Relaxed);
}

/// A block is about to run.
extern "C" fn executed(_fixed: c_uint, data: *mut c_void) {
    let (counter, kind) = Kind::unpack(data.addr());
    let processor = processor();
    let (counts, others) = (&COUNTS[processor], &OTHERS[processor]);
    let before = NOW.load(Relaxed);
    let paused = others.paused.load(Relaxed);
    if paused != 0 {
        add(&others.polled, before - paused);
        others.paused.store(0, Relaxed);
    }
    if let Some(count) = counts.get(counter) {
        add(count, kind.instructions);
    }
    if kind.copying != 0 {
        add(&others.copying, kind.copying);
        add(&others.copied, kind.copied);
    }
    let now = before + kind.instructions + kind.copying;
    NOW.store(now, Relaxed);
    if kind.pauses {
        others.paused.store(now, Relaxed);
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
    for (processor, others) in OTHERS.iter().enumerate() {
        line(out, processor, &others.copied, || "copied".into())?;
        line(out, processor, &others.copying, || "copying".into())?;
        line(out, processor, &others.polled, || "polled".into())?;
    }
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
