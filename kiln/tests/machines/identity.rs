//! Who a machine is, before anything that runs in it can ask: after the moment of a fork no line that its workload writes has
//! anything of another's.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::common::{Home, compile, finish_within, until};
use super::{HOME, WHOLE, whole_image};

/// What the workload saw of its machine, all at once.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Host name, machine id, the file of the host name, address.
    who: [String; 4],
    /// Drawn from the kernel's generator, by a read and by a call.
    random: [String; 2],
    /// Seconds since 1970.
    time: f64,
}

impl Seen {
    fn parse(line: &str) -> Self {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        let [host, id, file, read, drawn, time, address] = words.try_into().unwrap();
        Self { who: [host, id, file, address], random: [read, drawn], time: time.parse().unwrap() }
    }
}

/// What was written in a machine until now; a line that is being written is left out.
#[track_caller]
fn lines(home: &Home, name: &str) -> Vec<Seen> {
    let text = home.kiln(["exec", name, "cat", "/lines"]);
    assert_eq!(text.code, 0, "{text:?}");
    let whole = text.stdout.rfind('\n').map_or("", |end| &text.stdout[..end]);
    whole.lines().map(Seen::parse).collect()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// What was seen after the moment up to which two have the same past. The first line may have been begun before.
fn since_fork<'a>(of: &'a [Seen], other: &[Seen]) -> &'a [Seen] {
    let shared = of.iter().zip(other).take_while(|(one, other)| one == other).count();
    assert!(shared > 20, "they have a past: {shared} lines");
    &of[(shared + 1).min(of.len())..]
}

#[test]
fn no_workload_sees_anything_of_another_machine_after_the_moment_of_a_fork() {
    let Some(home) = &*HOME else { return };
    if kiln_fixtures::require("nft").is_none() {
        return;
    }
    whole_image(home);
    let program = home.beside("witness");
    compile("witness", &program);
    // With a device of its own a machine sees the address that others see; that of the user-space network is the same in all.
    home.ok(["network", "create", "lane"]);
    let share = format!("{}:/witness:ro", program.display());
    let words = [
        "run",
        "-d",
        "--vm",
        "--memory",
        "256m",
        "--name",
        "witness",
        "--network",
        "tap:lane",
        "-v",
        &share,
        WHOLE,
    ];
    // The first with such a device makes its template, which a busy host takes its time for.
    let run = home.command([&words[..], &["/witness", "/lines"]].concat());
    let ended = finish_within(run, Duration::from_secs(240));
    assert_eq!(ended.code, 0, "{ended:?}");
    let count = |name: &str| home.ok(["exec", name, "sh", "-c", "wc -l < /lines"]).parse::<usize>().unwrap();
    until("it writes", || {
        home.kiln(["exec", "witness", "test", "-e", "/lines"]).code == 0 && count("witness") > 100
    });
    home.ok(["snapshot", "create", "--memory", "witness", "past"]);
    let mut begun = Vec::new();
    for fork in ["left", "right"] {
        begun.push(now());
        home.ok(["fork", "witness", fork]);
    }
    let at = [count("witness"), count("left"), count("right")];
    until("all go on", || {
        ["witness", "left", "right"].iter().zip(at).all(|(name, before)| count(name) > before + 100)
    });
    let [parent, left, right] = ["witness", "left", "right"].map(|name| lines(home, name));
    let histories = [
        ("the original", since_fork(&parent, &left), begun[0]),
        ("left", since_fork(&left, &parent), begun[0]),
        ("right", since_fork(&right, &parent), begun[1]),
    ];
    let mut random = BTreeSet::new();
    let mut drawn = 0;
    for (name, history, from) in &histories {
        assert!(history.len() > 50, "{name}: {}", history.len());
        let first = &history[0];
        assert!(first.who.iter().all(|what| what.len() > 6), "{name}: {first:?}");
        for seen in *history {
            assert_eq!(seen.who, first.who, "{name}");
            // From the first line on its clock is right, and goes forward.
            assert!(seen.time > from - 1.0 && seen.time < now() + 1.0, "{name}: {seen:?} after {from}");
            random.extend(&seen.random);
            drawn += 2;
        }
    }
    assert_eq!(random.len(), drawn, "no number is drawn twice");
    for what in 0..4 {
        let values: BTreeSet<_> = histories.iter().map(|(_, history, _)| &history[0].who[what]).collect();
        assert_eq!(values.len(), histories.len(), "{values:?}");
    }

    // What was saved is the same machine when it goes on, at another time, and it does not draw the same numbers again.
    home.ok(["snapshot", "restore", "--force", "witness", "past"]);
    let from = now();
    home.ok(["start", "witness"]);
    let saved = left.iter().zip(&parent).take_while(|(one, other)| one == other).count();
    until("it goes on", || count("witness") > saved);
    let again = lines(home, "witness");
    let again = since_fork(&again, &parent);
    assert!(!again.is_empty());
    for seen in again {
        assert_eq!(seen.who, histories[0].1[0].who);
        assert!(seen.time > from - 1.0 && seen.time < now() + 1.0, "{seen:?} after {from}");
        assert!(seen.random.iter().all(|number| random.insert(number)), "{seen:?}");
    }
    home.ok(["rm", "-f", "witness", "left", "right"]);
    home.ok(["network", "rm", "lane"]);
}
