//! The control service: one request, one answer, and for some a body.

use kiln_link::message::{self, Answer, Request};
use kiln_link::{LinkError, Opener, Stream};

use crate::agent::{Machine, aside};
use crate::failure::{Doing as _, Failure};
use crate::{archive, configure, disks, identity, layer, process, stats};

/// Does what one request says.
pub(crate) async fn answer(
    machine: &Machine,
    opener: &Opener,
    request: Request,
    stream: &mut Stream,
) -> Result<(), LinkError> {
    let outcome = match request {
        Request::Configure(wanted) => {
            configure::configure(machine, &wanted, opener).await.map(|()| Answer::Done)
        }
        Request::Prepare { files } => configure::prepare(machine, &files).map(|()| Answer::Done),
        Request::Rehearse(wanted) => configure::rehearse(machine, &wanted).map(|()| Answer::Done),
        Request::Signal { process, signal } => {
            process::signal(machine, process, signal).await.map(|()| Answer::Done)
        }
        Request::Stats => stats::measure(machine).map(Answer::Stats),
        Request::Processes => stats::processes().map(Answer::Processes),
        Request::Sync => aside(sync).await.map(|()| Answer::Done),
        Request::PowerOff => return power_off(machine, stream).await,
        Request::Grow { size } => grow(machine, size).map(|()| Answer::Done),
        Request::Clock { now } => identity::set_clock(now).map(|()| Answer::Done),
        Request::Pack { path, follow } => return archive::pack(path, follow, stream).await,
        Request::Unpack { path } => return archive::unpack(path, stream).await,
        Request::Layer => return layer::give(machine, stream).await,
    };
    message::send(stream, &outcome.unwrap_or_else(Answer::Failed)).await
}

fn sync() -> Result<(), Failure> {
    rustix::fs::sync();
    Ok(())
}

fn grow(machine: &Machine, size: u64) -> Result<(), Failure> {
    match &*machine.root() {
        Some(root) => disks::grow_to(&root.disk, size),
        None => Err(crate::failure::invalid("there is no disk yet")),
    }
}

async fn power_off(machine: &Machine, stream: &mut Stream) -> Result<(), LinkError> {
    if let Err(failure) = machine.workload.end().await {
        crate::failure::say(failure);
    }
    if let Err(failure) = aside(sync).await {
        crate::failure::say(failure);
    }
    message::send(stream, &Answer::Done).await?;
    let ended = crate::told::off().doing("power off");
    message::send(stream, &ended.map_or_else(Answer::Failed, |()| Answer::Done)).await
}
