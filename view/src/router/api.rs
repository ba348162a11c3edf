//! The messages and the service of `proto/router.proto`, and how errors travel.

use kiln_contract::{BackendError, ErrorKind};
use tonic::{Code, Status};

/// As they are generated.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
mod generated {
    tonic::include_proto!("kiln.router.v1");
}

pub use self::generated::router_client::RouterClient;
#[cfg(target_os = "linux")]
pub(super) use self::generated::router_server::{Router, RouterServer};
pub use self::generated::{
    MountReply, MountRequest, RemountReply, RemountRequest, ShutdownReply, ShutdownRequest, StatusReply,
    StatusRequest, UnmountReply, UnmountRequest, View, unmount_request,
};

const KINDS: [(ErrorKind, Code); 5] = [
    (ErrorKind::NotFound, Code::NotFound),
    (ErrorKind::Conflict, Code::AlreadyExists),
    (ErrorKind::State, Code::FailedPrecondition),
    (ErrorKind::Invalid, Code::InvalidArgument),
    (ErrorKind::Unsupported, Code::Unimplemented),
];

/// What a client is told. The hint travels as details.
#[cfg(target_os = "linux")]
pub(super) fn to_status(error: &BackendError) -> Status {
    let code = KINDS.iter().find(|(kind, _)| *kind == error.kind()).map_or(Code::Unknown, |(_, code)| *code);
    Status::with_details(code, error.with_causes(), error.hint_text().unwrap_or_default().to_owned().into())
}

/// What was told.
pub(super) fn from_status(status: &Status) -> BackendError {
    let kind =
        KINDS.iter().find(|(_, code)| *code == status.code()).map_or(ErrorKind::Failed, |(kind, _)| *kind);
    let error = BackendError::new(kind, status.message());
    match std::str::from_utf8(status.details()) {
        Ok(hint) if !hint.is_empty() => error.hint(hint),
        _ => error,
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn an_error_arrives_as_it_was_sent_with_its_causes() {
        let sent = BackendError::caused("cannot do it", std::io::Error::other("the disk is full"))
            .of_kind(ErrorKind::State)
            .hint("make room");
        let told = from_status(&to_status(&sent));
        assert_eq!(told.to_string(), "cannot do it: the disk is full");
        assert_eq!((told.kind(), told.hint_text()), (ErrorKind::State, Some("make room")));
        let plain = from_status(&to_status(&BackendError::new(ErrorKind::Failed, "no")));
        assert_eq!((plain.kind(), plain.hint_text()), (ErrorKind::Failed, None));
    }
}
