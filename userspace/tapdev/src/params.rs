// SPDX-License-Identifier: MIT OR Apache-2.0
//! The description of a disk as records of `SET_PARAMS`.

use ring::tap::abi::{self, DiscardLimits, Geometry, ParamHead};
use ring::tap::params::Params;
use zerocopy::{Immutable, IntoBytes};

/// The records that say this.
pub fn records(params: &Params) -> Vec<u8> {
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let mut bytes = Vec::new();
    let geometry = Geometry {
        sectors: params.sectors,
        logical_block: params.logical_block,
        physical_block: params.physical_block,
        flags: flag(params.read_only, abi::GEOMETRY_READ_ONLY)
            | flag(params.write_cache, abi::GEOMETRY_WRITE_CACHE)
            | flag(params.may_shrink, abi::GEOMETRY_MAY_SHRINK),
        reserved: 0,
    };
    add(&mut bytes, abi::PARAM_GEOMETRY, &geometry);
    if let Some(discard) = &params.discard {
        let limits = DiscardLimits {
            granularity: discard.granularity,
            alignment: discard.alignment,
            secure: u32::from(discard.secure),
            reserved: 0,
        };
        add(&mut bytes, abi::PARAM_DISCARD, &limits);
    }
    bytes
}

fn add<T: IntoBytes + Immutable>(bytes: &mut Vec<u8>, kind: u32, record: &T) {
    let head = ParamHead {
        kind,
        // CAST: records are small.
        len: size_of::<T>() as u32,
    };
    bytes.extend_from_slice(head.as_bytes());
    bytes.extend_from_slice(record.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::records;
    use ring::tap::params::{Discard, Params};

    #[test]
    fn kernel_reads_what_is_written() {
        let mut params = Params {
            sectors: 12344,
            logical_block: 4096,
            physical_block: 8192,
            read_only: true,
            write_cache: false,
            discard: None,
            may_shrink: false,
        };
        assert_eq!(Params::parse(&records(&params)), Ok(params));
        params.read_only = false;
        params.write_cache = true;
        params.may_shrink = true;
        params.discard = Some(Discard {
            granularity: 65536,
            alignment: 4096,
            secure: true,
        });
        assert_eq!(Params::parse(&records(&params)), Ok(params));
    }
}
