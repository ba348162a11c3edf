//! Connections that are forwarded: from the client to ports that the machine reaches, and from the machine to the client.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as Blocking};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_link::message::{self, Output, Process};
use kiln_ssh::{Channel, Event, Opener, Opening};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use crate::process::{self, Attachment};

/// The most of `getent`'s words that are read.
const LONGEST_ANSWER: usize = 16 << 10;
/// Bytes that are read from a connection at once.
const PIECE: usize = 32 << 10;

/// Who looks up names: the machine's own `getent`, as the user. This program is static, and cannot load what a name service of
/// the image may need.
pub(super) struct Names {
    pub(super) user: String,
    pub(super) process: Arc<Process>,
    pub(super) group: Arc<OwnedFd>,
}

impl Names {
    async fn addresses(&self, host: &str) -> Vec<IpAddr> {
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            return vec![address];
        }
        if host == "localhost" || host.is_empty() {
            return vec![Ipv4Addr::LOCALHOST.into(), std::net::Ipv6Addr::LOCALHOST.into()];
        }
        // A name is an argument, and must not be taken for a flag.
        if host.starts_with('-') {
            return Vec::new();
        }
        let words = self.ask(host).await.unwrap_or_default();
        let mut addresses: Vec<IpAddr> =
            words.lines().filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok()).collect();
        addresses.dedup();
        addresses
    }

    async fn ask(&self, host: &str) -> Option<String> {
        let process = Process {
            args: ["getent", "ahosts", host].map(str::to_owned).to_vec(),
            user: self.user.clone(),
            cwd: "/".to_owned(),
            ..Process::clone(&self.process)
        };
        let running = process::begin(Arc::clone(&self.group), process).await.ok()?;
        let (mut ours, theirs) = tokio::io::duplex(LONGEST_ANSWER);
        running.attach.send(Attachment::over(theirs)).await.ok()?;
        let mut words = Vec::new();
        while let Some(output) = message::receive(&mut ours).await.ok()? {
            match output {
                Output::Stdout(bytes) if words.len() + bytes.len() <= LONGEST_ANSWER => words.extend(bytes),
                Output::Stderr(_) | Output::Started => {}
                _ => break,
            }
        }
        String::from_utf8(words).ok()
    }
}

/// Connects, and carries what goes through.
pub(super) async fn connect(names: Names, host: String, port: u16, opening: Opening) {
    for address in names.addresses(&host).await {
        if let Ok(stream) = TcpStream::connect(SocketAddr::new(address, port)).await {
            if let Some(channel) = opening.accept() {
                carry(&channel, stream).await;
            }
            return;
        }
    }
}

/// Listens, and opens a channel for each connection; the port, and what ends it.
pub(super) fn listen(address: &str, port: u16, opener: Opener) -> Option<(u16, AbortHandle)> {
    let place: IpAddr = match address {
        "" | "*" => Ipv4Addr::UNSPECIFIED.into(),
        "localhost" => Ipv4Addr::LOCALHOST.into(),
        other => other.parse().ok()?,
    };
    let bind = || -> io::Result<(u16, TcpListener)> {
        let listener = Blocking::bind((place, port))?;
        listener.set_nonblocking(true)?;
        Ok((listener.local_addr()?.port(), TcpListener::from_std(listener)?))
    };
    let (port, listener) = bind().ok()?;
    let address = address.to_owned();
    let task = tokio::spawn(async move {
        while let Ok((stream, origin)) = listener.accept().await {
            let (opener, address) = (opener.clone(), address.clone());
            tokio::spawn(async move {
                if let Some(channel) = opener.forwarded(&address, port, origin).await {
                    carry(&channel, stream).await;
                }
            });
        }
    });
    Some((port, task.abort_handle()))
}

/// Carries both directions until both have ended, or one end is gone.
async fn carry(channel: &Channel, mut stream: TcpStream) {
    let (mut reader, mut writer) = stream.split();
    let to_client = async {
        let mut buffer = vec![0; PIECE];
        loop {
            match reader.read(&mut buffer).await {
                Ok(0) => break channel.end(),
                Ok(count) => channel.send(&buffer[..count]).await.map_err(io::Error::other)?,
                Err(error) => return Err(error),
            }
        }
        Ok::<_, io::Error>(())
    };
    let to_stream = async {
        loop {
            match channel.next(true).await {
                Event::Data(data) => writer.write_all(&data).await?,
                Event::End => writer.shutdown().await?,
                // Also the ordinary end: the client closes when both sides have said all.
                Event::Closed => return Err::<(), _>(io::Error::from(io::ErrorKind::ConnectionReset)),
                Event::Request(_, wants_answer) => channel.answer(wants_answer, false),
            }
        }
    };
    // Of an error on one side, nobody on the other can be told more than that it is over.
    let _ = tokio::try_join!(to_client, to_stream);
}
