//! Image: built from the commit's tree, tagged by commit, pushed, and from then on used only by the registry's digest.
//!
//! The line: build → tag → push with progress → digest from the registry's words, checked against the engine's.
//! Never deploys a tag, and never guesses a digest that the registry did not say.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::PushImageInfo;
use bollard::query_parameters::{
    ListImagesOptionsBuilder, PushImageOptionsBuilder, RemoveImageOptions, TagImageOptionsBuilder,
};
use futures_util::StreamExt;

use super::patience::{Trouble, engine, patiently};
use super::{Built, CheckedOut, Scope, StageError, StageResult, buildkit, limited};
use crate::builds::Millis;
use crate::config::{Config, Environment, Retention};
use crate::docker;
use crate::docker::registry::{self, Logins};
use crate::fail_point;

const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How often another build of the same commit may take the tag between our tagging and our push.
const TAG_RACES_MAX: usize = 3;

/// Builds and pushes the image of this commit.
pub async fn run(scope: &Scope<'_>, checked_out: &CheckedOut) -> StageResult<Built> {
    let image = &checked_out.pipeline.image;
    let repository = format!("{}/{}", scope.environment.image_prefix, image.name);
    let id = buildkit::build_target(scope, checked_out, image.target.as_deref()).await?;
    let mut built = Built {
        tag: format!("{repository}:{}", checked_out.commit),
        repository,
        digest: String::new(),
        config_digest: id,
    };
    scope.log.line(format!("built {}", built.config_digest));
    let limit = Duration::from_secs(scope.environment.limits.push_timeout_seconds);
    built.digest = limited(scope, "the push of the image", limit, push(scope, &built)).await?;
    scope.log.line(format!("pushed {}", built.reference()));
    Ok(built)
}

/// Whether the registry still has what an earlier attempt pushed; false too where it does not answer.
pub async fn still_there(scope: &Scope<'_>, built: &Built) -> bool {
    let ask = async {
        let docker = docker::connect(scope.docker).await?;
        let login = Logins::read(scope.docker, scope.environment)
            .await
            .ok()
            .and_then(|logins| logins.of(&built.repository));
        docker
            .inspect_registry_image(&built.reference(), login)
            .await
    };
    let found = limited(scope, "asking the registry", PATIENCE, async {
        ask.await.map_err(|error| StageError::Agent(error.into()))
    });
    found
        .await
        .is_ok_and(|found| found.descriptor.digest.as_deref() == Some(&built.digest))
}

/// Removes from the engine those images of the agent's environments that `retention` does not keep, or that were tagged before a
/// moment; how many. The registry keeps what was pushed, and it is what is deployed and put back.
pub async fn remove_old(config: &Config, before: Millis) -> anyhow::Result<usize> {
    let docker = docker::connect(&config.docker).await?;
    let mut ours = Vec::new();
    for environment in &config.environments {
        ours.extend(tagged(&docker, environment).await?);
    }
    let mut removed = 0;
    for tag in outlived(ours, &config.retention, before) {
        // One that a container uses stays until that is gone.
        let asked = docker.remove_image(&tag, None::<RemoveImageOptions>, None);
        removed += usize::from(asked.await.is_ok());
    }
    Ok(removed)
}

/// An image of ours on the engine, under the tags of one repository.
#[derive(Debug, Clone)]
struct Tagged {
    /// Where it is counted: environment and repository.
    place: (String, String),
    tags: Vec<String>,
    /// Last. An image that was built from the cache alone is itself as old as that.
    tagged_at: Millis,
    /// With the layers that it shares.
    bytes: u64,
}

async fn tagged(docker: &Docker, environment: &Environment) -> anyhow::Result<Vec<Tagged>> {
    let label = format!("{}={}", buildkit::LABEL_ENVIRONMENT, environment.name);
    let options = ListImagesOptionsBuilder::default()
        .filters(&HashMap::from([("label", vec![label])]))
        .build();
    let prefix = format!("{}/", environment.image_prefix);
    let mut found = Vec::new();
    for image in docker.list_images(Some(options)).await? {
        let mut tags: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for tag in image
            .repo_tags
            .into_iter()
            .filter(|tag| tag.starts_with(&prefix))
        {
            let repository = registry::split(&tag).0.to_owned();
            tags.entry(repository).or_default().push(tag);
        }
        if tags.is_empty() {
            continue;
        }
        // One of which nothing can be learnt stays.
        let Ok(known) = docker.inspect_image(&image.id).await else {
            continue;
        };
        let tagged_at = known.metadata.and_then(|known| known.last_tag_time);
        let tagged_at = tagged_at.map_or(image.created, |at| at.unix_timestamp()) * 1000;
        found.extend(tags.into_iter().map(|(repository, tags)| Tagged {
            place: (environment.name.clone(), repository),
            tags,
            tagged_at,
            bytes: u64::try_from(image.size).unwrap_or(0),
        }));
    }
    Ok(found)
}

/// The tags that go. The newest image of each place stays, whatever agent.yaml says: a build that runs may need it.
fn outlived(mut ours: Vec<Tagged>, kept: &Retention, before: Millis) -> Vec<String> {
    ours.sort_by_key(|image| std::cmp::Reverse(image.tagged_at));
    let (mut stay, mut bytes, mut gone) = (HashMap::new(), 0_u64, Vec::new());
    for image in ours {
        let stay: &mut usize = stay.entry(image.place).or_default();
        let with_it = bytes.saturating_add(image.bytes);
        let is_too_much =
            *stay >= kept.images || image.tagged_at < before || with_it > kept.image_bytes;
        if *stay > 0 && is_too_much {
            gone.extend(image.tags);
        } else {
            (*stay, bytes) = (*stay + 1, with_it);
        }
    }
    gone
}

/// How long the registry may take to say whether it has an image.
const PATIENCE: Duration = Duration::from_secs(30);

async fn push(scope: &Scope<'_>, built: &Built) -> StageResult<String> {
    let logins = Logins::read(scope.docker, scope.environment).await?;
    let host = registry::host(&built.repository);
    for _ in 0..TAG_RACES_MAX {
        let digest = patiently(scope, &format!("registry {host}"), || async {
            let docker = engine(scope).await?;
            tag(&docker, built).await?;
            push_once(scope, &docker, built, &logins).await
        })
        .await?;
        if is_ours(scope, built, &digest).await? {
            return Ok(digest);
        }
        scope.log.line(format!(
            "the registry answered {digest}, which is not our image: pushing again"
        ));
    }
    let tag = &built.tag;
    Err(anyhow!("cannot push {tag}: the digest that the registry answers is not that of the image just built; does something else push this tag?").into())
}

async fn tag(docker: &Docker, built: &Built) -> Result<(), Trouble> {
    let (repository, tag) = registry::split(&built.tag);
    let options = TagImageOptionsBuilder::default()
        .repo(repository)
        .tag(tag)
        .build();
    docker
        .tag_image(&built.config_digest, Some(options))
        .await
        .map_err(|error| Trouble::of(error, format!("cannot tag the image as {}", built.tag)))?;
    fail_point::at("image: tagged");
    Ok(())
}

async fn push_once(
    scope: &Scope<'_>,
    docker: &Docker,
    built: &Built,
    logins: &Logins,
) -> Result<String, Trouble> {
    scope.log.line(format!("pushing {}", built.tag));
    let (repository, tag) = registry::split(&built.tag);
    let options = PushImageOptionsBuilder::default().tag(tag).build();
    let mut stream = pin!(docker.push_image(repository, Some(options), logins.of(repository)));
    let mut progress = Progress::default();
    let mut digest = None;
    while let Some(item) = stream.next().await {
        let info = item.map_err(|error| refused(scope, built, logins, error))?;
        let status = info.status.as_deref().unwrap_or_default();
        digest = digest.or_else(|| digest_in(status));
        if let Some(line) = progress.see(&info) {
            scope.log.line(line);
        }
    }
    fail_point::at("image: pushed");
    digest.ok_or_else(|| Trouble::Away(anyhow!("the push of {} ended without a digest", built.tag)))
}

/// Whether the engine, too, knows our image by this digest in this repository.
async fn is_ours(scope: &Scope<'_>, built: &Built, digest: &str) -> StageResult<bool> {
    let ask = || async {
        let docker = engine(scope).await?;
        docker
            .inspect_image(&built.config_digest)
            .await
            .map_err(|error| Trouble::of(error, "cannot inspect the image just pushed"))
    };
    let image = patiently(scope, "Docker", ask).await?;
    let familiar = built
        .repository
        .strip_prefix("docker.io/")
        .unwrap_or(&built.repository);
    let familiar = familiar.strip_prefix("library/").unwrap_or(familiar);
    let wanted = [
        format!("{familiar}@{digest}"),
        format!("{}@{digest}", built.repository),
    ];
    Ok(image
        .repo_digests
        .iter()
        .flatten()
        .any(|known| wanted.contains(known)))
}

/// Our error with advice, or `Away` where the registry does not answer.
fn refused(scope: &Scope<'_>, built: &Built, logins: &Logins, error: Error) -> Trouble {
    let wanted = format!("cannot push {}", built.tag);
    let Error::DockerStreamError { error: words } = &error else {
        return Trouble::of(error, wanted);
    };
    let words = logins.scrub(words);
    if docker::registry_is_away(&words) {
        return Trouble::Away(anyhow!("{wanted}: {words}"));
    }
    let lower = words.to_lowercase();
    let is_login = [
        "unauthorized",
        "denied",
        "no basic auth",
        "authentication required",
        "forbidden",
    ]
    .iter()
    .any(|sign| lower.contains(sign));
    let host = registry::host(&built.repository);
    let error = match is_login {
        true => anyhow!(
            "{wanted}: the registry {host} does not accept the login ({words}); set `registry: {{username, password}}` of environment {:?} in agent.yaml, or `docker login {host}` as the agent's user",
            scope.environment.name
        ),
        false => anyhow!("{wanted}: {words}"),
    };
    Trouble::Final(error.into())
}

/// `latest: digest: sha256:2760… size: 1150`.
fn digest_in(status: &str) -> Option<String> {
    let (_, rest) = status.split_once("digest: ")?;
    let digest = rest.split(' ').next()?;
    let hex = digest.strip_prefix("sha256:")?;
    let is_digest = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_digest.then(|| digest.to_owned())
}

/// One sum over all layers: bollard does not say which layer a line is about, so they are told apart by their size.
#[derive(Default)]
struct Progress {
    sent: HashMap<i64, i64>,
    said: Option<Instant>,
}

impl Progress {
    fn see(&mut self, info: &PushImageInfo) -> Option<String> {
        let detail = info.progress_detail.as_ref()?;
        let (current, total) = (detail.current?, detail.total.filter(|total| *total > 0)?);
        self.sent.insert(total, current.min(total));
        let now = Instant::now();
        let last = *self.said.get_or_insert(now);
        if now - last < PROGRESS_EVERY {
            return None;
        }
        self.said = Some(now);
        let (sent, all) = (
            self.sent.values().sum::<i64>(),
            self.sent.keys().sum::<i64>(),
        );
        Some(format!(
            "pushed {}.{} of {}.{} MB",
            sent / 1_000_000,
            sent % 1_000_000 / 100_000,
            all / 1_000_000,
            all % 1_000_000 / 100_000
        ))
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::ProgressDetail;

    use super::*;

    #[test]
    fn a_digest_is_read_from_the_registrys_words_and_from_nothing_else() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(
            digest_in(&format!("k: digest: {digest} size: 1150")),
            Some(digest)
        );
        assert_eq!(digest_in("k: digest: sha256:short size: 1"), None);
        assert_eq!(digest_in("Pushed"), None);
    }

    #[test]
    fn images_go_by_number_by_age_and_by_what_they_take_and_the_newest_of_each_repository_stays() {
        let day = 24 * 60 * 60 * 1000;
        let image = |environment: &str, tag: &str, days_old: i64| Tagged {
            place: (environment.to_owned(), registry::split(tag).0.to_owned()),
            tags: vec![tag.to_owned()],
            tagged_at: -days_old * day,
            bytes: 100,
        };
        let ours = vec![
            image("one", "r/a:4", 4),
            image("one", "r/a:1", 1),
            image("one", "r/a:2", 2),
            image("one", "r/b:3", 3),
            image("two", "r/a:5", 5),
        ];
        let gone = |images, image_bytes, before| {
            let kept = Retention {
                images,
                image_bytes,
                ..Retention::default()
            };
            outlived(ours.clone(), &kept, before)
        };
        let days_ago = |days: i64| -days * day;
        assert!(gone(3, 500, days_ago(6)).is_empty());
        assert_eq!(gone(2, 500, days_ago(6)), ["r/a:4"], "by number");
        assert_eq!(gone(3, 500, days_ago(3)), ["r/a:4"], "by age");
        assert!(
            gone(3, 500, Millis::MIN).is_empty(),
            "nobody knows the time"
        );
        assert_eq!(gone(3, 399, days_ago(6)), ["r/a:4"], "by what they take");
        assert_eq!(
            gone(2, 400, days_ago(6)),
            ["r/a:4"],
            "what goes takes nothing"
        );
        assert_eq!(gone(0, 0, days_ago(0)), ["r/a:2", "r/a:4"]);
    }

    #[test]
    fn a_push_tells_the_sum_over_its_layers_now_and_then() {
        let piece = |current: i64, total: i64| PushImageInfo {
            progress_detail: Some(ProgressDetail {
                current: Some(current),
                total: Some(total),
            }),
            ..PushImageInfo::default()
        };
        let mut progress = Progress::default();
        assert_eq!(progress.see(&piece(1_000_000, 4_000_000)), None);
        assert_eq!(progress.see(&PushImageInfo::default()), None);
        assert_eq!(progress.see(&piece(512, 6_200_000)), None, "too soon");
        progress.said = progress
            .said
            .and_then(|said| said.checked_sub(PROGRESS_EVERY));
        // The last piece of a layer may say more than all of it.
        let told = progress.see(&piece(4_000_512, 4_000_000));
        assert_eq!(told.as_deref(), Some("pushed 4.0 of 10.2 MB"));
    }
}
