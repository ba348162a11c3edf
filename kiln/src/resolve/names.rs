//! Names of instances: which are allowed, and readable random ones.

use kiln_contract::InstanceId;

use super::{ResolveError, Result};

const ADJECTIVES: [&str; 48] = [
    "amber", "bold", "brave", "bright", "brisk", "calm", "clever", "cosy", "crisp", "deft", "eager", "early",
    "fair", "fiery", "fine", "fond", "fresh", "gentle", "glad", "glazed", "golden", "grand", "happy",
    "hardy", "honest", "humble", "jolly", "keen", "kind", "lively", "lucky", "mellow", "merry", "neat",
    "nimble", "noble", "patient", "plucky", "proud", "quick", "quiet", "ready", "rustic", "steady", "sunny",
    "swift", "warm", "wise",
];
const NOUNS: [&str; 48] = [
    "amphora",
    "anvil",
    "ash",
    "basin",
    "beaker",
    "bellows",
    "bowl",
    "brick",
    "carafe",
    "ceramic",
    "chimney",
    "clay",
    "cobalt",
    "crucible",
    "cup",
    "dish",
    "ember",
    "ewer",
    "figurine",
    "flask",
    "furnace",
    "glaze",
    "hearth",
    "jar",
    "jug",
    "lantern",
    "lathe",
    "loam",
    "mortar",
    "mosaic",
    "mug",
    "oven",
    "pebble",
    "pitcher",
    "plate",
    "porcelain",
    "pot",
    "potter",
    "quartz",
    "saucer",
    "shard",
    "slip",
    "spark",
    "spout",
    "stoneware",
    "tile",
    "urn",
    "vase",
];

/// A random readable name, such as `brave_teapot`. After some tries (`attempt` above 2) a number is added.
pub(crate) fn random_name(attempt: u32) -> String {
    let random = InstanceId::random();
    let number =
        |from: usize| usize::from_str_radix(&random.as_str()[from..from + 8], 16).unwrap_or_default();
    let name = format!("{}_{}", ADJECTIVES[number(0) % ADJECTIVES.len()], NOUNS[number(8) % NOUNS.len()]);
    if attempt > 2 { format!("{name}_{}", number(16) % 10_000) } else { name }
}

/// Whether `name` may name an instance, a volume or a network: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, at most 253 bytes.
pub(crate) fn is_name(name: &str) -> bool {
    name.len() <= 253
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// Refuses what cannot be a name.
pub(crate) fn check_name(flag: &'static str, name: &str) -> Result<()> {
    if is_name(name) {
        Ok(())
    } else {
        Err(ResolveError::value(flag, name, "a name is [a-zA-Z0-9][a-zA-Z0-9_.-]*, at most 253 characters"))
    }
}

/// Refuses what cannot be a host name: `HOST_NAME_MAX` is 64.
pub(crate) fn check_hostname(name: &str) -> Result<()> {
    if is_name(name) && name.len() <= 64 {
        Ok(())
    } else {
        let why = "a host name is [a-zA-Z0-9][a-zA-Z0-9_.-]*, at most 64 characters";
        Err(ResolveError::value("--hostname", name, why))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn random_names_are_names_and_differ() {
        let names: BTreeSet<String> = (0..64).map(|attempt| random_name(attempt % 5)).collect();
        assert!(names.len() > 40, "{names:?}");
        assert!(names.iter().all(|name| is_name(name)), "{names:?}");
    }

    #[test]
    fn no_word_is_there_twice() {
        assert_eq!(BTreeSet::from(ADJECTIVES).len(), ADJECTIVES.len());
        assert_eq!(BTreeSet::from(NOUNS).len(), NOUNS.len());
    }

    #[test]
    fn what_is_not_a_name_is_refused() {
        for name in ["", ".x", "-x", "a b", "a/b", "ä", &"x".repeat(254)] {
            assert!(check_name("--name", name).is_err(), "{name}");
        }
        assert!(check_name("--name", "a.b-c_9").is_ok());
    }
}
