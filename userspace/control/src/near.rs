// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words that a user may have meant.

/// Whether a word may be another one with a slip: two letters at most differ, or it is a part of it.
pub fn is_near(word: &str, other: &str) -> bool {
    let (word, other) = (word.to_lowercase(), other.to_lowercase());
    let is_part = word.chars().count() > 1 && other.contains(&word);
    is_part || distance(&word, &other) <= 2.min(other.chars().count().saturating_sub(1))
}

/// Number of letters to insert, remove or exchange to make one word from another.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut costs: Vec<usize> = (0..=to.len()).collect();
    for (row, letter) in from.chars().enumerate() {
        let (mut corner, mut left) = (row, row + 1);
        for (cost, other) in costs.iter_mut().skip(1).zip(&to) {
            let replaced = corner + usize::from(letter != *other);
            corner = *cost;
            left = replaced.min(left + 1).min(corner + 1);
            *cost = left;
        }
        if let Some(first) = costs.first_mut() {
            *first = row + 1;
        }
    }
    costs.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{distance, is_near};

    #[test]
    fn words_with_a_slip_are_near() {
        for (from, to, letters) in [("", "ab", 2), ("web", "wbe", 2), ("web1", "web2", 1)] {
            assert_eq!(distance(from, to), letters, "{from} {to}");
        }
        assert!(is_near("bsp", "bps") && is_near("Web", "web-1"));
        assert!(!is_near("mail", "web") && !is_near("x", "db"));
    }
}
