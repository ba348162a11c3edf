//! QEMU's machine protocol (`docs/interop/qmp-spec.rst` of QEMU): JSON lines over a socket; one command at a time.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::VmmError;

/// How long QEMU may take for an answer: it is not asked anything that takes long.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest line that is read, in bytes. QEMU's longest answers (schemas) are not asked for.
const LONGEST: u64 = 1 << 20;

/// A command of the protocol.
pub(crate) trait Command: Serialize {
    /// Its name.
    const NAME: &'static str;
    /// What is answered.
    type Answer: DeserializeOwned;
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:literal $type:ident { $($field:ident: $kind:ty),* } -> $answer:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub(crate) struct $type<'a> {
            $(pub(crate) $field: $kind,)*
            #[serde(skip)]
            pub(crate) lifetime: std::marker::PhantomData<&'a ()>,
        }

        impl Command for $type<'_> {
            const NAME: &'static str = $name;
            type Answer = $answer;
        }
    )*};
}

commands! {
    /// Ends the negotiation of capabilities: the first command.
    "qmp_capabilities" Capabilities {} -> IgnoredAny;
    /// Stops executing.
    "stop" Stop {} -> IgnoredAny;
    /// Goes on executing.
    "cont" Continue {} -> IgnoredAny;
    /// What the machine is doing.
    "query-status" QueryStatus {} -> Status;
    /// Saves the state of all devices, and not memory. (The command is older than its other uses.)
    "xen-save-devices-state" SaveDevices { filename: &'a str, live: bool } -> IgnoredAny;
    /// A disk has another size.
    "block_resize" ResizeBlock { device: &'a str, size: u64 } -> IgnoredAny;
    /// How much memory the guest should keep.
    "balloon" Balloon { value: u64 } -> IgnoredAny;
}

/// What a machine is doing.
#[derive(Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) status: String,
}

/// A line of QEMU's.
#[derive(Deserialize)]
struct Line<A> {
    #[serde(rename = "return")]
    answer: Option<A>,
    error: Option<Refusal>,
    event: Option<String>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// A connection on which commands are understood.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Waits for QEMU's greeting and begins.
    pub(crate) fn open(socket: UnixStream) -> Result<Self, VmmError> {
        let fail = |source| VmmError::Io { doing: "speak to the hypervisor".to_owned(), source };
        socket.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        socket.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        let mut qmp = Self { reader: BufReader::new(socket) };
        qmp.line("the greeting")?;
        qmp.execute(&Capabilities { lifetime: std::marker::PhantomData })?;
        Ok(qmp)
    }

    /// Has a command executed.
    pub(crate) fn execute<C: Command>(&mut self, command: &C) -> Result<C::Answer, VmmError> {
        #[derive(Serialize)]
        struct Words<'a, C> {
            execute: &'static str,
            #[serde(skip_serializing_if = "is_empty")]
            arguments: &'a C,
        }
        // QEMU takes a command byte by byte, with all else that it does in between: short ones are executed sooner.
        fn is_empty<C>(_: &&C) -> bool {
            size_of::<C>() == 0
        }
        let nonsense = |words: String| VmmError::Nonsense { command: C::NAME, words };
        let mut words = serde_json::to_vec(&Words { execute: C::NAME, arguments: command })
            .map_err(|error| nonsense(error.to_string()))?;
        words.push(b'\n');
        self.reader
            .get_mut()
            .write_all(&words)
            .map_err(VmmError::io(format!("tell the hypervisor `{}`", C::NAME)))?;
        loop {
            let line = self.line(C::NAME)?;
            let line: Line<C::Answer> =
                serde_json::from_str(&line).map_err(|error| nonsense(format!("{error} in {line}")))?;
            match line {
                Line { error: Some(refusal), .. } => {
                    return Err(VmmError::Refused { command: C::NAME, words: refusal.desc });
                }
                Line { answer: Some(answer), .. } => return Ok(answer),
                Line { event: Some(event), .. } => tracing::debug!(event, "hypervisor"),
                _ => return Err(nonsense("neither an answer nor an event".to_owned())),
            }
        }
    }

    fn line(&mut self, command: &'static str) -> Result<String, VmmError> {
        let mut line = String::new();
        let read = (&mut self.reader)
            .take(LONGEST)
            .read_line(&mut line)
            .map_err(VmmError::io(format!("hear the hypervisor's answer to `{command}`")))?;
        if read == 0 || !line.ends_with('\n') {
            let source = std::io::ErrorKind::UnexpectedEof.into();
            return Err(VmmError::Io {
                doing: format!("hear the hypervisor's answer to `{command}`"),
                source,
            });
        }
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that says `lines`, each after it has heard one.
    fn peer(lines: &'static [&'static str]) -> (Result<Qmp, VmmError>, std::thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let speaking = std::thread::spawn(move || {
            let mut reader = BufReader::new(theirs);
            let mut heard = Vec::new();
            for said in lines {
                let mut line = String::new();
                if !heard.is_empty() || said != &GREETING {
                    reader.read_line(&mut line).unwrap();
                }
                heard.push(line);
                reader.get_mut().write_all(said.as_bytes()).unwrap();
            }
            heard
        });
        (Qmp::open(ours), speaking)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";
    const DONE: &str = "{\"return\": {}}\n";

    #[test]
    fn commands_are_lines_events_are_passed_over_and_refusals_are_errors() {
        let (qmp, peer) = peer(&[
            GREETING,
            DONE,
            "{\"event\": \"STOP\", \"timestamp\": {}}\n{\"return\": {\"status\": \"paused\", \"running\": false}}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such device\"}}\n",
        ]);
        let mut qmp = qmp.unwrap();
        let lifetime = std::marker::PhantomData;
        assert_eq!(qmp.execute(&QueryStatus { lifetime }).unwrap().status, "paused");
        let error = qmp.execute(&ResizeBlock { device: "disk", size: 1, lifetime }).unwrap_err();
        assert_eq!(error.to_string(), "the hypervisor refused `block_resize`: no such device");
        drop(qmp);
        let heard = peer.join().unwrap();
        assert_eq!(heard[1], "{\"execute\":\"qmp_capabilities\"}\n");
        assert_eq!(
            heard[3],
            "{\"execute\":\"block_resize\",\"arguments\":{\"device\":\"disk\",\"size\":1}}\n"
        );
    }

    #[test]
    fn nonsense_and_the_end_are_errors() {
        for (said, words) in [
            ("what?\n", "makes no sense"),
            ("{}\n", "neither an answer nor an event"),
            ("{\"return\"", "hear the hypervisor's answer"),
        ] {
            let lines: &'static [&'static str] = Box::leak(Box::new([GREETING, said]));
            let (qmp, _) = peer(lines);
            let error = qmp.unwrap_err().to_string();
            assert!(error.contains(words), "{said}: {error}");
        }
    }
}
