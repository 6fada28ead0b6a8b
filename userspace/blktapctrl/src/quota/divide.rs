// SPDX-License-Identifier: MIT OR Apache-2.0
//! How what a group may do is divided among its disks.

/// Divisor of an equal part: a member without demand gets that fraction, so that it can begin with something.
const IDLE: u64 = 32;
/// Demand of a member that would do more if it could.
pub(super) const ALL: u64 = u64::MAX;

/// Divides `total` among members with these demands: each gets its demand or an equal part of the rest that the others
/// leave, whichever is less. The part without demand is shared by all. The sum is never more than `total`.
pub(super) fn divide(total: u64, wants: &[u64]) -> Vec<u64> {
    let count = wants.len() as u64;
    if count == 0 {
        return Vec::new();
    }
    let least = total / count / IDLE;
    let mut modest: Vec<(u64, usize)> = wants.iter().copied().zip(0..).collect();
    modest.sort_unstable();
    let (mut left, mut others) = (total, count);
    let mut parts = Vec::with_capacity(wants.len());
    for (want, index) in modest {
        let part = want.max(least).min(left / others);
        left -= part;
        others -= 1;
        parts.push((index, part));
    }
    parts.sort_unstable();
    let more = left / count;
    parts.into_iter().map(|(_, part)| part + more).collect()
}

#[cfg(test)]
mod tests {
    use super::super::jitter::QuotaRng;
    use super::{divide, ALL, IDLE};

    #[test]
    fn who_wants_much_gets_what_others_leave() {
        assert_eq!(divide(100, &[]), Vec::<u64>::new());
        assert_eq!(divide(1000, &[ALL]), [1000]);
        assert_eq!(divide(900, &[ALL, ALL, ALL]), [300, 300, 300]);
        assert_eq!(divide(900, &[100, ALL, 100]), [100, 700, 100]);
        assert_eq!(divide(900, &[ALL, 500, 100]), [400, 400, 100]);
        // No disk lacks anything: all get a part of the rest.
        assert_eq!(divide(900, &[100, 200, 0]), [297, 397, 206]);
        // A disk that asks for nothing can begin.
        assert_eq!(divide(64_000, &[0, ALL]), [1000, 63_000]);
    }

    #[test]
    fn no_division_is_unfair_or_wasteful() {
        let mut chance = QuotaRng(7);
        for _ in 0..20_000 {
            let total = chance.below(1 << 20) + 64;
            let count = chance.below(12) + 1;
            let wants: Vec<u64> = (0..count)
                .map(|_| match chance.below(3) {
                    0 => ALL,
                    1 => 0,
                    _ => chance.below(1 << 19),
                })
                .collect();
            let parts = divide(total, &wants);
            let sum: u64 = parts.iter().sum();
            assert!(sum <= total, "{total} {wants:?} {parts:?}");
            // Nothing is left but what cannot be divided.
            assert!(total - sum <= count, "{total} {wants:?} {parts:?}");
            let equal = total / count;
            for (want, part) in wants.iter().zip(&parts) {
                assert!(part >= want.min(&equal), "{total} {wants:?} {parts:?}");
                assert!(*part >= equal / IDLE, "{total} {wants:?} {parts:?}");
            }
            // If a disk asks for all, the others get no more than they ask for, or an idle disk's part.
            if wants.contains(&ALL) {
                for (want, part) in wants.iter().zip(&parts) {
                    let most = (*want).max(equal / IDLE).saturating_add(1);
                    assert!(*part <= most, "{total} {wants:?} {parts:?}");
                }
            }
        }
    }
}
