// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The ABI compared with its C header, name by name in both directions.

use std::collections::BTreeMap;
use std::mem::offset_of;

use ring::tap::abi::{self, ioctl, kept};

/// Size of a field, from a function that returns it.
fn field_size<S, F>(_: impl Fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! structure {
    ($all:ident, $c:ident, $ty:ident, $($field:ident),*) => {
        $all.push((concat!(stringify!($c), ".size").to_string(), size_of::<abi::$ty>() as i64));
        $({
            let name = concat!(stringify!($c), ".", stringify!($field));
            let size = field_size(|s: &abi::$ty| &s.$field);
            $all.push((name.to_string(), offset_of!(abi::$ty, $field) as i64));
            $all.push((format!("{name}.size"), size as i64));
        })*
    };
}

macro_rules! numbers {
    ($all:ident, $module:ident, $($name:ident),*) => {
        $({
            let (name, value) = (stringify!($name), u64::from($module::$name));
            $all.push((name.to_string(), (value & 0x7fff_ffff) as i64));
            $all.push((format!("{name}.high"), (value >> 31) as i64));
        })*
    };
}

fn ours() -> BTreeMap<String, i64> {
    let mut all = Vec::new();
    structure!(
        all, desc, Desc, op, flags, segments, generation, sector, sectors, sequence, arrived_ns,
        tag, queue, deliveries, reserved
    );
    structure!(all, segment, TapSegment, offset, len);
    structure!(all, completion, Completion, tag, flags, generation, result, reserved);
    structure!(
        all,
        info,
        Info,
        version,
        minor,
        features,
        epoch,
        tags,
        max_segments,
        descriptors_len,
        segments_offset,
        arena_len,
        state,
        pid,
        waiting,
        delivered,
        committed,
        replayed,
        refused,
        oldest_ns,
        domain,
        device,
        sectors,
        poison_sector,
        poison_sectors,
        poison_op,
        poisoned,
        isolated,
        memory_kib,
        lacking,
        direct,
        backings,
        executing,
        failed_flushes,
        reserved
    );
    structure!(all, claims, Claims, size, fence, operations, features, settle_ms, reserved);
    structure!(
        all,
        create,
        CreateCommand,
        version,
        minor,
        arena_kib,
        fail_after_s,
        max_deaths,
        reserved0,
        reserved
    );
    structure!(all, destroy, Destroy, minor, flags);
    structure!(all, buffer, Buffer, addr, len, reserved);
    structure!(all, exchange, Exchange, commits, tags);
    structure!(all, param_head, ParamHead, kind, len);
    structure!(
        all,
        geometry,
        Geometry,
        sectors,
        logical_block,
        physical_block,
        flags,
        reserved
    );
    structure!(
        all,
        discard_limits,
        DiscardLimits,
        granularity,
        alignment,
        secure,
        reserved
    );
    structure!(
        all, map_op, MapOp, op, flags, backing, generation, sector, sectors, offset, reserved
    );
    structure!(all, maps, Maps, ops, generation, backings, refused, reserved);
    structure!(
        all,
        backing_add,
        BackingAdd,
        minor,
        number,
        fd,
        flags,
        reserved
    );
    structure!(all, backing_remove, BackingRemove, minor, number, reserved);
    structure!(
        all, mapped, Mapped, minor, room, missed, evicted, refused, recalled, express, reserved
    );
    numbers!(
        all,
        abi,
        MAX_BACKINGS,
        MAP_SET,
        MAP_RECALL,
        MAP_COLLECT,
        MAP_FLUSH,
        MAP_READ,
        MAP_WRITE,
        MAP_ZERO,
        MAP_TRACK,
        MAP_NO_BACKING,
        MAX_MAP_OPS,
        BACKING_WRITE,
        MISS_UNMAPPED,
        MISS_PARTIAL,
        MISS_READ_ONLY,
        MISS_UNALIGNED,
        MISS_PIECES,
        MISS_BACKINGS,
        MISS_NEVER,
        MISS_QUEUE,
        MISSES
    );
    numbers!(
        all,
        abi,
        VERSION,
        MAX_TAGS,
        NO_TAG,
        MAX_COMMANDS,
        MAX_SEGMENTS,
        MMAP_DESCRIPTORS,
        MMAP_ARENA,
        OP_READ,
        OP_WRITE,
        OP_FLUSH,
        OP_DISCARD,
        OP_WRITE_ZEROES,
        OP_SECURE_DISCARD,
        DESC_FUA,
        DESC_PREFLUSH,
        DESC_REPLAY,
        COMPLETION_RETURNED,
        FEATURE_URING_CMD,
        FEATURE_MAPS,
        FEATURE_CLAIM,
        FEATURE_COMMANDS,
        FEATURE_WIDEN,
        FEATURES,
        OPERATIONS,
        FENCE_LOCAL,
        FENCE_SESSION,
        FENCE_NONE,
        MAX_SETTLE_MS,
        CLAIMS_FIRST_SIZE,
        CLAIMS_MAX_SIZE,
        STATE_IDLE,
        STATE_OPEN,
        STATE_LIVE,
        STATE_FENCING,
        STATE_RECOVERING,
        PARAM_GEOMETRY,
        PARAM_DISCARD,
        GEOMETRY_READ_ONLY,
        GEOMETRY_WRITE_CACHE,
        GEOMETRY_MAY_SHRINK
    );
    numbers!(
        all,
        kept,
        OP_MAP_MISS,
        OP_RECALLED,
        OP_QUIESCE,
        OP_IO_DONE,
        COMPLETION_RETRY_LATER,
        FEATURE_HANDOFF,
        FEATURE_RETRY_LATER,
        PARAM_MAPPING,
        HANDOFF,
        SESSION_OVER
    );
    numbers!(
        all,
        ioctl,
        CREATE,
        DESTROY,
        QUERY,
        BACKING_ADD,
        BACKING_REMOVE,
        MAPPED,
        INFO,
        SET_PARAMS,
        START,
        CLAIM,
        EXCUSE,
        EXCHANGE,
        MAP
    );
    all.into_iter().collect()
}

#[test]
fn the_abi_is_that_of_its_c_header() {
    let name = "the_abi_is_that_of_its_c_header";
    let Some(theirs) = crate::layout::compiled(name, "tap/layout.c") else {
        return;
    };
    assert_eq!(ours(), theirs);
}

/// Every public constant and structure of the ABI is compared.
#[test]
fn nothing_is_left_out_of_the_comparison() {
    let text = concat!(
        include_str!("../../../src/ring/tap/abi.rs"),
        include_str!("../../../src/ring/tap/abi/map.rs")
    );
    let ours = ours();
    let mut count = 0;
    for line in text.lines() {
        let Some(name) = line.trim().strip_prefix("pub const ") else {
            continue;
        };
        if name.starts_with("fn ") {
            continue;
        }
        let name = name.split(':').next().expect("a name");
        assert!(ours.contains_key(name), "{name} is not compared");
        count += 1;
    }
    // The structures of this file, each with its name in C and its type.
    let own = include_str!("layout.rs");
    let compared = own.split("structure!(").skip(1);
    let compared: Vec<_> = compared
        .filter_map(|words| words.split(',').nth(2))
        .map(str::trim)
        .collect();
    for name in text.lines().filter_map(|l| l.strip_prefix("pub struct ")) {
        let name = name.trim_end_matches(" {");
        assert!(compared.contains(&name), "{name} is not compared");
        count += 1;
    }
    assert!(count > 40, "{count}");
}
