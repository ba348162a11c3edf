//! What a registry asks for when it answers 401 (`WWW-Authenticate`, RFC 9110 §11.6.1; distribution token spec).

use std::collections::BTreeSet;

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// How a registry wants requests to be authorised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer {
        realm: String,
        service: Option<String>,
        /// The scope that the refused request needs.
        scope: Option<String>,
    },
}

impl Challenge {
    /// The strongest challenge that Kiln can meet among those of an answer: `Bearer`, then `Basic`.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let challenges: Vec<Self> = values.flat_map(parse).collect();
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Self::Bearer { .. }));
        bearer.or(challenges.first()).cloned()
    }
}

fn parse(value: &str) -> Vec<Challenge> {
    let Ok(challenges) = http_auth::parse_challenges(value) else { return Vec::new() };
    let known = challenges.iter().filter_map(|challenge| {
        let parameter = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
        };
        if challenge.scheme.eq_ignore_ascii_case("basic") {
            Some(Challenge::Basic)
        } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
            Some(Challenge::Bearer {
                realm: parameter("realm")?,
                service: parameter("service"),
                scope: parameter("scope"),
            })
        } else {
            None
        }
    });
    known.collect()
}

/// What a request needs to be allowed to do: `repository:<path>:<actions>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Scopes(BTreeSet<String>);

impl Scopes {
    /// To read a repository.
    pub(crate) fn pull(repository: &str) -> Self {
        Self(BTreeSet::from([format!("repository:{repository}:pull")]))
    }

    /// To write a repository.
    pub(crate) fn push(repository: &str) -> Self {
        Self(BTreeSet::from([format!("repository:{repository}:pull,push")]))
    }

    /// These, and what a mount from another repository needs.
    pub(crate) fn and_pull(mut self, repository: &str) -> Self {
        self.0.insert(format!("repository:{repository}:pull"));
        self
    }

    /// These, and what a challenge asks for on top.
    pub(crate) fn and_challenged(&self, scope: Option<&str>) -> Self {
        let mut all = self.clone();
        for wanted in scope.unwrap_or_default().split(' ').filter(|wanted| !wanted.is_empty()) {
            if !all.cover(wanted) {
                all.0.insert(wanted.to_owned());
            }
        }
        all
    }

    /// Whether `wanted` is in one of these already: the same resource, and no further action.
    fn cover(&self, wanted: &str) -> bool {
        let Some((resource, actions)) = wanted.rsplit_once(':') else { return self.0.contains(wanted) };
        self.0.iter().any(|have| {
            have.rsplit_once(':').is_some_and(|(have_resource, have_actions)| {
                let have_actions: Vec<&str> = have_actions.split(',').collect();
                have_resource == resource && actions.split(',').all(|action| have_actions.contains(&action))
            })
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// One text for all, as a cache's key.
    pub(crate) fn key(&self) -> String {
        self.iter().collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        Challenge::of(&headers)
    }

    #[test]
    fn challenges_are_read_in_all_their_forms() {
        let bearer = |scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: "https://auth.test/token".into(),
                service: Some("registry.test".into()),
                scope: scope.map(str::to_owned),
            })
        };
        for (values, expected) in [
            (
                vec![
                    r#"Bearer realm="https://auth.test/token",service="registry.test",scope="repository:a/b:pull,push""#,
                ],
                bearer(Some("repository:a/b:pull,push")),
            ),
            (vec![r#"bearer REALM="https://auth.test/token", service=registry.test"#], bearer(None)),
            (
                vec![r#"Basic realm="x", Bearer realm="https://auth.test/token",service="registry.test""#],
                bearer(None),
            ),
            (
                vec![
                    r#"Basic realm="x""#,
                    r#"Bearer realm="https://auth.test/token",service="registry.test""#,
                ],
                bearer(None),
            ),
            (vec![r#"Basic realm="Registry Realm""#], Some(Challenge::Basic)),
            (vec![r#"Bearer service="no realm""#], None),
            (vec!["Negotiate"], None),
            (vec![], None),
        ] {
            assert_eq!(challenge(&values), expected, "{values:?}");
        }
    }

    #[test]
    fn scopes_add_only_what_is_not_in_them() {
        let push = Scopes::push("a/b");
        assert_eq!(push.and_challenged(Some("repository:a/b:pull")).key(), "repository:a/b:pull,push");
        assert_eq!(
            push.and_pull("c").and_challenged(Some("repository:a/b:delete")).key(),
            "repository:a/b:delete repository:a/b:pull,push repository:c:pull"
        );
    }
}
