//! What a supervisor waits for, and what it does then.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use kiln_contract::{ExecSpec, ExitStatus, LogStream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitOptions, wait};

use super::Supervisor;
use super::clients::{Client, Console, Role, farewell};
use crate::kind::Run;
use crate::process;
use crate::streams::{self, Streams};

/// Something that was ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signals,
    Listener,
    Client(usize),
    WorkloadInput,
    WorkloadOutput(LogStream),
    ConsoleInput,
    ConsoleOutput(LogStream),
    Probe,
}

const STREAMS: [LogStream; 2] = [LogStream::Stdout, LogStream::Stderr];

impl Supervisor {
    /// Waits once, and handles all that is ready.
    pub(super) fn handle_events(&mut self) -> io::Result<()> {
        let ready = self.wait()?;
        for (source, flags) in ready {
            match source {
                Source::Signals => self.on_signals(),
                Source::Listener => self.on_connection(),
                Source::Client(index) => self.on_client(index, flags),
                Source::WorkloadInput => {
                    if let Some(run) = &mut self.run {
                        run.ends.write_input();
                    }
                }
                Source::WorkloadOutput(stream) => self.on_output(stream),
                Source::ConsoleInput => self.on_console_input(),
                Source::ConsoleOutput(stream) => {
                    if self.console.as_mut().is_some_and(|console| !console.write(stream)) {
                        self.on_reader_gone(stream);
                    }
                }
                Source::Probe => {
                    if let Some(probe) = self.health.as_mut().and_then(super::Health::probe) {
                        probe.read();
                    }
                }
            }
        }
        self.clients.retain(|client| !client.is_gone());
        Ok(())
    }

    fn wait(&self) -> io::Result<Vec<(Source, PollFlags)>> {
        let mut sources = Vec::with_capacity(8);
        let mut fds = Vec::with_capacity(8);
        let mut add = |source, fd: rustix::fd::BorrowedFd<'_>, flags| {
            // SAFETY: every descriptor belongs to a field of `self`, none of which changes before `poll` returns.
            let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&fd)) };
            sources.push(source);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        add(Source::Signals, self.signals.fd().as_fd(), PollFlags::IN);
        if let Some(listener) = &self.listener {
            add(Source::Listener, listener.as_fd(), PollFlags::IN);
        }
        let input_is_full = self.run.as_ref().is_some_and(|run| run.ends.input.is_full());
        for (index, client) in self.clients.iter().enumerate() {
            let mut flags = PollFlags::empty();
            if !(input_is_full && client.gives_input()) {
                flags |= PollFlags::IN;
            }
            if client.has_output() {
                flags |= PollFlags::OUT;
            }
            add(Source::Client(index), client.socket().as_fd(), flags);
        }
        if let Some(run) = &self.run {
            if let Some(input) = run.ends.input()
                && !run.ends.input.is_empty()
            {
                add(Source::WorkloadInput, input.as_fd(), PollFlags::OUT);
            }
            if !self.somebody_is_slow() {
                for stream in STREAMS {
                    if let Some(output) = run.ends.output(stream) {
                        add(Source::WorkloadOutput(stream), output.as_fd(), PollFlags::IN);
                    }
                }
            }
        }
        if let Some(console) = &self.console {
            if let Some(stdin) = &console.stdin
                && !input_is_full
            {
                add(Source::ConsoleInput, stdin.as_fd(), PollFlags::IN);
            }
            for (stream, fd) in console.waiting() {
                add(Source::ConsoleOutput(stream), fd.as_fd(), PollFlags::OUT);
            }
        }
        if let Some(health) = &self.health
            && let Some(output) = health.probe_output()
        {
            add(Source::Probe, output.as_fd(), PollFlags::IN);
        }
        let timeout = self.timeout();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        Ok(sources
            .into_iter()
            .zip(fds.iter().map(PollFd::revents))
            .filter(|(_, flags)| !flags.is_empty())
            .collect())
    }

    fn timeout(&self) -> Option<Timespec> {
        let health = self.health.as_ref().filter(|_| !self.paused).map(super::Health::wakes);
        let next = [self.kill_at, self.restart_at, health].into_iter().flatten().min()?;
        Some(process::timespec(next.saturating_duration_since(Instant::now())))
    }

    /// Whether the workload should wait before it writes more.
    fn somebody_is_slow(&self) -> bool {
        self.clients.iter().any(Client::is_slow) || self.console.as_ref().is_some_and(Console::is_slow)
    }

    fn on_signals(&mut self) {
        while let Some(signal) = self.signals.next() {
            match signal {
                libc::SIGCHLD => self.reap(),
                // The size of a terminal that the workload does not have.
                libc::SIGWINCH => {}
                _ if self.proxies_signals => self.pass_on(signal),
                // The host shuts down, or an administrator wants it to end.
                libc::SIGTERM | libc::SIGINT => self.stop(None),
                _ => {}
            }
        }
    }

    /// Takes in the end of every child that has ended: the workload, a check of its health, and whatever became a
    /// child of this process because its parent ended.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code,
                (None, Some(signal)) => 128 + signal,
                _ => continue,
            };
            let code = u8::try_from(code).unwrap_or(u8::MAX);
            if self.run.as_ref().is_some_and(|run| run.process.pid == pid) {
                self.ended = Some(self.dies_of.take().map_or(code, |signal| 128 + signal));
            } else if let Some(health) = &mut self.health
                && health.probe().is_some_and(|probe| probe.process.pid == pid)
            {
                let changed = health.ended(Some(code), None, Instant::now());
                self.write_health(changed);
            }
        }
    }

    fn on_connection(&mut self) {
        let Some(listener) = &self.listener else { return };
        match crate::control::accept(listener) {
            Ok(Some(socket)) => self.clients.push(Client::new(socket)),
            Ok(None) => {}
            Err(error) => tracing::warn!("cannot accept a connection: {error}"),
        }
    }

    fn on_client(&mut self, index: usize, flags: PollFlags) {
        let Some(client) = self.clients.get_mut(index) else { return };
        if flags.contains(PollFlags::OUT) {
            client.write();
        }
        if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            client.read();
            self.hear(index);
        }
    }

    fn on_output(&mut self, stream: LogStream) {
        let mut buffer = [0; 16 << 10];
        let Some(run) = &mut self.run else { return };
        if let Some(bytes) = run.ends.read(stream, &mut buffer) {
            self.show(stream, bytes);
        }
    }

    /// Takes in what a workload that has ended still had in its pipes.
    pub(super) fn drain(&mut self, run: &mut Run) {
        let mut buffer = [0; 16 << 10];
        for stream in STREAMS {
            // As much as the largest pipe holds; another process may still write to it, without end.
            for _ in 0..64 {
                let Some(bytes) = run.ends.read(stream, &mut buffer) else { break };
                self.show(stream, bytes);
            }
        }
    }

    fn show(&mut self, stream: LogStream, bytes: &[u8]) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.write(stream, bytes)
        {
            // A full disk must not end the workload; those attached still see what it writes.
            tracing::error!("cannot write the log: {error}");
        }
        for client in &mut self.clients {
            if matches!(client.role, Role::Attached(_)) {
                client.show(stream, bytes);
            }
        }
        if let Some(console) = &mut self.console {
            console.show(stream, bytes);
        }
    }

    fn on_console_input(&mut self) {
        let Some(console) = &mut self.console else { return };
        let Some(stdin) = &console.stdin else { return };
        let mut buffer = [0; 16 << 10];
        let ends = self.run.as_mut().map(|run| &mut run.ends);
        match rustix::io::read(stdin, &mut buffer) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok(read) if read > 0 => {
                if let Some(ends) = ends {
                    ends.input.push(&buffer[..read]);
                    ends.write_input();
                    if ends.stdin.is_none() {
                        // The workload reads no more: neither need we.
                        console.stdin = None;
                    }
                }
            }
            // Its end, or it cannot be read (a terminal of another session).
            _ => {
                console.stdin = None;
                if let Some(ends) = ends {
                    ends.input_ended = true;
                    ends.write_input();
                }
            }
        }
    }

    /// Whoever read the output of this command has gone (`kiln run … | head -1`): the workload learns it as it would if it
    /// wrote there itself, at its next write. Unless somebody else is looking.
    fn on_reader_gone(&mut self, stream: LogStream) {
        let attached = self.clients.iter().any(|client| matches!(client.role, Role::Attached(_)));
        if let Some(run) = &mut self.run
            && !attached
        {
            match stream {
                LogStream::Stdout => run.ends.stdout = None,
                LogStream::Stderr => run.ends.stderr = None,
            }
        }
    }

    /// Begins a check that is due, ends one that takes too long.
    pub(super) fn look_after_health(&mut self, now: Instant) {
        if self.paused || self.run.is_none() || self.ended.is_some() {
            return;
        }
        let Some(health) = &mut self.health else { return };
        if let Some(overdue) = health.overdue(now) {
            let mut all = process::descendants(overdue.pid);
            all.push(overdue.pid);
            for pid in all.into_iter().filter_map(process::raw) {
                // Not reaped yet, or a process of the workload: at worst one that has just ended.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            let changed = health.ended(None, Some("the check took too long and was killed"), now);
            self.write_health(changed);
        } else if health.is_due(now) {
            let command = health.command().to_vec();
            let begun = self.begin_check(command);
            let Some(health) = &mut self.health else { return };
            match begun {
                Ok((process, output)) => health.began(process, output, now),
                Err(error) => {
                    let changed = health.ended(None, Some(&error), now);
                    self.write_health(changed);
                }
            }
        }
    }

    fn begin_check(
        &self,
        command: Vec<String>,
    ) -> Result<(kiln_contract::ProcessId, std::os::fd::OwnedFd), String> {
        let streams = || -> io::Result<_> {
            let (read, write) = streams::pipe()?;
            streams::set_nonblocking(&read)?;
            let stderr = write.try_clone()?;
            Ok((read, Streams::Pipes { stdin: streams::null()?, stdout: write, stderr }))
        };
        let (output, streams) = streams().map_err(|error| error.to_string())?;
        let spec = ExecSpec { args: command, ..ExecSpec::default() };
        let process = self.ground.exec(&self.record, &spec, streams).map_err(|error| error.to_string())?;
        Ok((process, output))
    }

    fn write_health(&mut self, changed: bool) {
        let Some(status) = self.health.as_ref().map(|health| health.status().clone()) else { return };
        if changed {
            tracing::info!(state = ?status.state, "health");
        }
        self.update(|record| record.health = Some(status));
    }

    /// Tells everybody how it ended, and waits until they have it, but not for ever: one may be suspended.
    pub(super) fn take_leave(&mut self, status: &ExitStatus) {
        for client in &mut self.clients {
            client.dismiss(&farewell(&client.role, status));
        }
        if let Some(console) = &mut self.console {
            console.finish();
        }
        self.clients.retain(|client| !client.is_gone());
        let patience = Instant::now() + Duration::from_secs(5);
        while !self.clients.is_empty() && Instant::now() < patience {
            let timeout = process::timespec(patience.saturating_duration_since(Instant::now()));
            let mut fds: Vec<PollFd<'_>> =
                self.clients.iter().map(|client| PollFd::new(client.socket(), PollFlags::OUT)).collect();
            if matches!(poll(&mut fds, Some(&timeout)), Err(error) if error != rustix::io::Errno::INTR) {
                return;
            }
            for client in &mut self.clients {
                client.write();
            }
            self.clients.retain(|client| !client.is_gone());
        }
    }
}
