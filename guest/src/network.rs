//! The machine's network: a TUN device, whose flows become streams to the host.

use std::io;
use std::sync::Arc;

use kiln_link::{Opener, Stream};
use kiln_usernet::guest::{Tun, TunConfig, run};
use tokio::sync::watch;

use crate::failure::{Doing as _, Failure, say};

/// Opens streams of one life.
#[derive(Debug)]
pub(crate) struct Life(Opener);

impl kiln_usernet::Open for Life {
    type Stream = Stream;

    async fn open(&self, service: u16) -> io::Result<Stream> {
        self.0.open(service).await.map_err(io::Error::other)
    }
}

/// A device that is up.
#[derive(Debug)]
pub(crate) struct Network(watch::Sender<Arc<Life>>);

impl Network {
    /// Makes the device with its addresses and routes, and carries what goes through it.
    pub(crate) fn start(opener: &Opener) -> Result<Self, Failure> {
        let tun = Tun::create(&TunConfig::default()).doing("make the network")?;
        let (lives, watched) = watch::channel(Arc::new(Life(opener.clone())));
        tokio::spawn(async move {
            if let Err(error) = run(tun, watched).await {
                say(format_args!("the network has ended: {error}"));
            }
        });
        Ok(Self(lives))
    }

    /// Goes on with another life. Connections of the one before are reset.
    pub(crate) fn go_on(&self, opener: &Opener) {
        self.0.send_replace(Arc::new(Life(opener.clone())));
    }
}
