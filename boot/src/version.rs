//! Versions of kernels, which are no numbers: `6.1.0-47-amd64`, `6.12.9+bpo`, `6.9-rc1`.

use std::cmp::Ordering;

/// Compares two: numbers by value, everything else by its letters.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    parts(a).cmp(&parts(b))
}

/// Runs of digits, and what is between them.
fn parts(version: &str) -> Vec<(u64, String)> {
    let mut parts: Vec<(u64, String)> = Vec::new();
    let mut was_digit = None;
    for letter in version.chars() {
        if was_digit.replace(letter.is_ascii_digit()) != Some(letter.is_ascii_digit()) {
            parts.push((0, String::new()));
        }
        if let Some((number, text)) = parts.last_mut() {
            match letter.to_digit(10) {
                Some(digit) => *number = number.saturating_mul(10).saturating_add(digit.into()),
                None => text.push(letter),
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_the_order_of_their_numbers() {
        let ordered =
            ["5.10.0", "6.1.0-9-amd64", "6.1.0-47-amd64", "6.1.100", "6.9.1", "6.10.2", "6.10.10", "7"];
        for (index, older) in ordered.iter().enumerate() {
            assert_eq!(compare(older, older), Ordering::Equal);
            for newer in &ordered[index + 1..] {
                assert_eq!(compare(older, newer), Ordering::Less, "{older} and {newer}");
                assert_eq!(compare(newer, older), Ordering::Greater, "{newer} and {older}");
            }
        }
        assert_eq!(compare(&"9".repeat(100), &"9".repeat(99)), Ordering::Equal, "no overflow");
    }
}
