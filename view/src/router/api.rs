//! The messages and the service of `proto/router.proto`, and how errors travel.

#[cfg(target_os = "linux")]
use kiln_contract::Digest;
use kiln_contract::{BackendError, ErrorKind};
use tonic::{Code, Status};

#[cfg(target_os = "linux")]
use crate::views::Alteration;

/// As they are generated.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
mod generated {
    tonic::include_proto!("kiln.router.v1");
}

pub use self::generated::router_client::RouterClient;
#[cfg(target_os = "linux")]
pub(super) use self::generated::router_server::{Router, RouterServer};
pub use self::generated::{
    MountReply, MountRequest, RemountReply, RemountRequest, Reset, Show, ShutdownReply, ShutdownRequest,
    StatusReply, StatusRequest, UnmountReply, UnmountRequest, View, remount_request, unmount_request,
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

/// What is to become of a view, as it is asked for. Live layers do not travel: the router has none.
#[cfg(target_os = "linux")]
pub(super) fn to_change(alteration: &Alteration) -> remount_request::Change {
    use remount_request::Change;
    match alteration {
        Alteration::Edit(editable) => Change::Editable(*editable),
        Alteration::Reset(paths) => Change::Reset(Reset { paths: paths.clone() }),
        Alteration::Show { reference, image, layers, binds: _ } => Change::Show(Show {
            reference: reference.clone(),
            image: image.to_string(),
            layers: layers.iter().map(ToString::to_string).collect(),
        }),
    }
}

/// What was asked for.
#[cfg(target_os = "linux")]
pub(super) fn from_change(change: remount_request::Change) -> Result<Alteration, BackendError> {
    use remount_request::Change;
    let digest = |text: String| {
        text.parse::<Digest>().map_err(|error| {
            BackendError::caused(format!("`{text}` is no digest"), error).of_kind(ErrorKind::Invalid)
        })
    };
    Ok(match change {
        Change::Editable(editable) => Alteration::Edit(editable),
        Change::Reset(Reset { paths }) => Alteration::Reset(paths),
        Change::Show(Show { reference, image, layers }) => Alteration::Show {
            reference,
            image: digest(image)?,
            layers: layers.into_iter().map(digest).collect::<Result<_, _>>()?,
            binds: Vec::new(),
        },
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_become_of_a_view_arrives_as_it_was_asked_for() {
        let digest = Digest::of(b"layer");
        for alteration in [
            Alteration::Edit(true),
            Alteration::Edit(false),
            Alteration::Reset(Vec::new()),
            Alteration::Reset(vec![b"/etc/\xff".to_vec(), b"usr".to_vec()]),
            Alteration::Show {
                reference: "me/app:1".into(),
                image: Digest::of(b"image"),
                layers: vec![digest, Digest::of(b"other")],
                binds: Vec::new(),
            },
        ] {
            assert_eq!(from_change(to_change(&alteration)).unwrap(), alteration);
        }
        let wrong = Show { reference: String::new(), image: "sha256:none".into(), layers: Vec::new() };
        let refused = from_change(remount_request::Change::Show(wrong)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert!(refused.to_string().contains("`sha256:none` is no digest"), "{refused}");
    }

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
