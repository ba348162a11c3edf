//! What those who are connected to a supervisor ask for.

use std::time::{Duration, Instant};

use kiln_contract::{BackendError, ErrorKind, InstanceStatus};
use rustix::termios::{Winsize, tcsetwinsize};

use super::Supervisor;
use super::clients::Role;
use crate::control::{self, Attach, ControlError, Failure, Kind, Reply, Request};
use crate::{process, signals};

impl Supervisor {
    /// Handles all that a client has said.
    pub(super) fn hear(&mut self, index: usize) {
        loop {
            let Some(client) = self.clients.get_mut(index) else { return };
            let frame = client.next();
            let attached = match &client.role {
                Role::Attached(attach) => Some(attach.clone()),
                _ => None,
            };
            match (frame, attached) {
                (Ok(None), _) => return,
                (Ok(Some((Kind::Message, payload))), _) => match control::parse(&payload) {
                    Ok(request) => self.answer(index, request),
                    Err(error) => return self.cut_off(index, &error),
                },
                (Ok(Some((Kind::Stdin, bytes))), Some(attach)) if attach.stdin => {
                    if let Some(run) = &mut self.run {
                        run.ends.input.push(&bytes);
                        run.ends.write_input();
                    }
                }
                (Ok(Some((Kind::StdinEnd, _))), Some(attach)) if attach.stdin => {
                    if let Some(run) = &mut self.run
                        && attach.closes_stdin
                        && run.ends.terminal.is_none()
                    {
                        run.ends.input_ended = true;
                        run.ends.write_input();
                    }
                }
                (Ok(Some((kind, _))), _) => {
                    return self.cut_off(index, &ControlError::Message(format!("unexpected {kind:?}")));
                }
                (Err(error), _) => return self.cut_off(index, &error),
            }
        }
    }

    fn cut_off(&mut self, index: usize, error: &ControlError) {
        tracing::warn!("{error}");
        if let Some(client) = self.clients.get_mut(index) {
            let error = BackendError::new(ErrorKind::Invalid, error.to_string());
            client.dismiss(&Reply::Failed(Failure::from(&error)));
        }
    }

    fn answer(&mut self, index: usize, request: Request) {
        let reply = match request {
            Request::Start { .. } => {
                Err(BackendError::new(ErrorKind::State, "the instance was started already"))
            }
            Request::Attach(attach) => match self.attach(&attach) {
                Ok(()) => {
                    if let Some(client) = self.clients.get_mut(index) {
                        client.role = Role::Attached(attach);
                    }
                    Ok(Some(Reply::Attached { tty: self.record.spec.process.tty }))
                }
                Err(error) => Err(error),
            },
            Request::Resize { rows, columns } => {
                self.resize(rows, columns);
                Ok(None)
            }
            Request::Signal { signal } => self.signal_by_user(signal).map(|()| Some(Reply::Done)),
            Request::Stop { timeout, discard } => {
                self.ending |= discard;
                if let Some(client) = self.clients.get_mut(index) {
                    client.role = Role::Waiting { stopping: true };
                }
                self.stopped_by_user = true;
                self.update(|record| record.stopped_by_user = true);
                self.stop(timeout);
                Ok(None)
            }
            Request::Wait => {
                if let Some(client) = self.clients.get_mut(index) {
                    client.role = Role::Waiting { stopping: false };
                }
                Ok(None)
            }
            Request::Pause => self.pause().map(|()| Some(Reply::Done)),
            Request::Resume => self.resume().map(|()| Some(Reply::Done)),
        };
        let Some(client) = self.clients.get_mut(index) else { return };
        // While streams are shown, a failed request is not worth the stream.
        match reply {
            Ok(None) => {}
            Ok(Some(Reply::Done)) | Err(_) if matches!(client.role, Role::Attached(_)) => {}
            Ok(Some(reply)) => client.tell(&reply),
            Err(error) => client.tell(&Reply::Failed(Failure::from(&error))),
        }
    }

    fn attach(&mut self, attach: &Attach) -> Result<(), BackendError> {
        let Some(run) = &self.run else {
            return Err(self.wrong_state("attach to", "it waits to be started again"));
        };
        if self.log.is_none() {
            return Err(BackendError::unsupported(
                "cannot attach: the streams of an instance that runs in the foreground with --rm belong to that command",
            ));
        }
        if let (Some((rows, columns)), true) = (attach.size, run.ends.terminal.is_some()) {
            self.resize(rows, columns);
        }
        Ok(())
    }

    fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = self.run.as_ref().and_then(|run| run.ends.terminal.as_ref()) {
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            let _ = tcsetwinsize(terminal, size);
        }
    }

    /// Passes a signal that this command got on to the workload.
    ///
    /// The kernel spares process 1 of a namespace what it does not handle: who typed Ctrl-C would wait for ever. What
    /// the signal would do to any other process is done to it.
    pub(super) fn pass_on(&mut self, number: i32) {
        let deadly = matches!(number, libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM);
        let spared =
            self.run.as_ref().is_some_and(|run| process::leaves_to_the_kernel(run.process.pid, number));
        if deadly && spared {
            self.dies_of = u8::try_from(number).ok();
            self.kill();
        } else {
            let _ = self.signal(number);
        }
    }

    /// Sends a signal to the workload's first process.
    pub(super) fn signal(&self, number: i32) -> Result<(), BackendError> {
        let Some(run) = &self.run else {
            return Err(self.wrong_state("signal", "it waits to be started again"));
        };
        let (Some(pid), Some(signal)) = (process::raw(run.process.pid), process::named(number)) else {
            return Err(BackendError::new(ErrorKind::Invalid, format!("{number} is no signal")));
        };
        // Not reaped yet, so that the number is still this process's.
        rustix::process::kill_process(pid, signal).map_err(|error| {
            BackendError::caused(format!("cannot send signal {number}"), std::io::Error::from(error))
        })
    }

    fn signal_by_user(&mut self, number: i32) -> Result<(), BackendError> {
        let ends_it = number == libc::SIGKILL
            || signals::parse(&self.record.spec.stop.signal).is_ok_and(|stop| stop == number);
        if ends_it {
            // As Docker has it: who kills an instance does not want it to be started again.
            self.stopped_by_user = true;
            self.update(|record| record.stopped_by_user = true);
        }
        if number != libc::SIGKILL {
            return self.signal(number);
        }
        if self.run.is_none() {
            return Err(self.wrong_state("signal", "it waits to be started again"));
        }
        self.kill();
        Ok(())
    }

    /// Asks the workload to end, and sees to it that it does. A restart that was to come does not.
    pub(super) fn stop(&mut self, timeout: Option<Duration>) {
        self.stopped_by_user = true;
        if self.run.is_none() {
            // Let the policy decide anew, at once, that there is no restart.
            self.restart_at = None;
            self.given_up = true;
            return;
        }
        let number = signals::parse(&self.record.spec.stop.signal).unwrap_or(libc::SIGTERM);
        let grace = timeout.unwrap_or(self.record.spec.stop.timeout);
        if let Err(error) = self.signal(number) {
            tracing::warn!("{error}");
        }
        if self.paused {
            // What is suspended hears nothing.
            let _ = self.resume();
        }
        let at = Instant::now().checked_add(grace);
        self.kill_at = match (self.kill_at, at) {
            (Some(before), Some(now)) => Some(before.min(now)),
            (before, now) => before.or(now),
        };
    }

    /// Ends the workload and all its processes now, or as soon as what it has written is safe.
    pub(super) fn kill(&mut self) {
        let Some(run) = &self.run else { return };
        if !self.ending
            && let Some(patience) = run.hold.as_ref().and_then(|hold| hold.end())
        {
            self.ending = true;
            self.kill_at = Some(Instant::now() + patience);
            return;
        }
        if let Some(pid) = process::raw(run.process.pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        // Thaws it, too: what is suspended by a v1 freezer does not even die.
        if let Some(hold) = &run.hold
            && let Err(error) = hold.kill()
        {
            tracing::warn!("cannot kill all of the workload: {error}");
        }
    }

    fn pause(&mut self) -> Result<(), BackendError> {
        let Some(run) = &self.run else {
            return Err(self.wrong_state("pause", "it waits to be started again"));
        };
        if self.paused {
            return Err(self.wrong_state("pause", "it is paused already"));
        }
        let Some(hold) = &run.hold else {
            return Err(BackendError::unsupported("cannot pause: the instance has no control group"));
        };
        hold.freeze()?;
        self.paused = true;
        self.update(|record| record.status = InstanceStatus::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), BackendError> {
        let hold = self.run.as_ref().and_then(|run| run.hold.as_ref()).filter(|_| self.paused);
        let Some(hold) = hold else {
            return Err(self.wrong_state("resume", "it is not paused"));
        };
        hold.thaw()?;
        self.paused = false;
        self.update(|record| record.status = InstanceStatus::Running);
        Ok(())
    }

    fn wrong_state(&self, doing: &str, why: &str) -> BackendError {
        BackendError::new(
            ErrorKind::State,
            format!("cannot {doing} instance {}: {why}", self.record.spec.name),
        )
    }
}
