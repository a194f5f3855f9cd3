//! Forks and templates.

use agent_api::*;
use api::CapsuleId;
use connectrpc::{ConnectError, ErrorCode};

use super::Subject;

pub(super) async fn all(subject: &Subject) {
    a_fork_leaves_the_parent_running(subject).await;
    forks_that_cannot_be(subject).await;
    a_template_outlasts_its_capsule(subject).await;
    templates_that_cannot_be(subject).await;
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|_| CapsuleId::random().to_string()).collect()
}

/// A name that no other check uses.
fn name() -> String {
    format!("of-{}", CapsuleId::random())
}

impl Subject {
    async fn fork(&self, id: &str, children: &[String]) -> Result<Vec<Child>, ConnectError> {
        let request = ForkCapsuleRequest { id: id.into(), children: children.to_vec(), ..Default::default() };
        Ok(self.lifecycle().fork_capsule(request).await?.into_owned().children)
    }

    async fn snapshot(&self, id: &str, name: &str) -> Result<Template, ConnectError> {
        let request = SnapshotCapsuleRequest { id: id.into(), name: name.into(), ..Default::default() };
        let answer = self.lifecycle().snapshot_capsule(request).await?.into_owned();
        Ok(answer.template.into_option().expect("a snapshot answers with the template"))
    }

    async fn delete_template(&self, name: &str) {
        let request = DeleteTemplateRequest { name: name.into(), ..Default::default() };
        self.lifecycle().delete_template(request).await.expect("a delete succeeds");
    }

    async fn template(&self, name: &str) -> Option<Template> {
        let answer = self.lifecycle().list_templates(ListTemplatesRequest::default()).await.expect("a list succeeds");
        answer.into_owned().templates.into_iter().find(|template| template.name == name)
    }
}

async fn a_fork_leaves_the_parent_running(subject: &Subject) {
    let parent = subject.running().await;
    let asked = ids(3);
    let children = subject.fork(&parent.id, &asked).await.expect("a running capsule is forked");
    assert!(children.iter().map(|child| &child.id).eq(&asked), "the children come in the order they were asked for");
    for child in &children {
        let capsule = child.capsule.as_option().unwrap_or_else(|| panic!("{}: {}", child.id, child.reason));
        assert_eq!((&capsule.id, capsule.state.as_known()), (&child.id, Some(CapsuleState::CAPSULE_STATE_RUNNING)));
        let spec = CapsuleSpec { id: child.id.clone(), ..parent.spec.as_option().expect("it has one").clone() };
        assert_eq!(capsule.spec.as_option(), Some(&spec), "a fork is what its parent is");
        assert!(capsule.generation > 0 && capsule.versions.contains_key("envd_version"));
        assert_eq!(subject.guest(&child.id, "true", &[]).await.expect("a fork is used").1, 0);
    }
    let again = subject.fork(&parent.id, &asked[..1]).await.expect("a fork is asked for again");
    let (first, repeated) = (&children[0].capsule, &again[0].capsule);
    let told = |capsule: &Capsule| (capsule.state, capsule.generation);
    assert_eq!(repeated.as_option().map(told), first.as_option().map(told), "what is there is answered as it is");

    let listed = subject.listed(&parent.id).await.expect("the parent is listed");
    assert_eq!(listed.state.as_known(), Some(CapsuleState::CAPSULE_STATE_RUNNING));
    assert_eq!(subject.guest(&parent.id, "true", &[]).await.expect("the parent is used").1, 0);

    // Each has a life of its own, as its parent has.
    subject.end(&parent.id).await;
    assert_eq!(subject.guest(&asked[0], "true", &[]).await.expect("a fork outlasts its parent").1, 0);
    subject.pause(&asked[1]).await.expect("a fork is paused");
    subject.resume(&asked[1]).await.expect("a fork is resumed");
    for id in &asked {
        subject.end(id).await;
    }
}

async fn forks_that_cannot_be(subject: &Subject) {
    let parent = subject.running().await.id;
    let twice = vec![ids(1)[0].clone(); 2];
    for children in [vec![], ids(101), twice, vec!["../../etc".into()]] {
        let error = subject.fork(&parent, &children).await.expect_err("these are not children");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    }
    let child = ids(1);
    subject.pause(&parent).await.expect("a running capsule is paused");
    let error = subject.fork(&parent, &child).await.expect_err("a paused capsule is not forked");
    assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
    subject.end(&parent).await;
    assert_eq!(subject.fork(&parent, &child).await.expect_err("it has ended").code, ErrorCode::NotFound);
    assert_eq!(subject.fork(&ids(1)[0], &child).await.expect_err("nobody has it").code, ErrorCode::NotFound);
    assert_eq!(subject.listed(&child[0]).await, None, "a fork that was refused left something");
}

async fn a_template_outlasts_its_capsule(subject: &Subject) {
    let capsule = subject.running().await;
    let spec = capsule.spec.as_option().expect("it has one").clone();
    let name = name();
    let template = subject.snapshot(&capsule.id, &name).await.expect("a running capsule becomes a template");
    assert_eq!(
        (&template.name, template.vcpus, template.memory_mib, template.disk_mib),
        (&name, spec.vcpus, spec.memory_mib, spec.disk_mib)
    );
    assert!(template.created_unix_ms > 0);
    assert_eq!(subject.template(&name).await.as_ref(), Some(&template));
    assert_eq!(subject.guest(&capsule.id, "true", &[]).await.expect("the capsule runs on").1, 0);
    subject.end(&capsule.id).await;

    // The sizes are the template's: they are repeated or left out.
    let (mut whole, mut sizeless) = (subject.spec(), subject.spec());
    whole.image.clone_from(&name);
    sizeless.image.clone_from(&name);
    (sizeless.vcpus, sizeless.memory_mib, sizeless.disk_mib) = (0, 0, 0);
    for spec in [&whole, &sizeless] {
        let capsule = subject.create(spec).await.expect("a capsule is made of a template");
        assert_eq!(capsule.state.as_known(), Some(CapsuleState::CAPSULE_STATE_RUNNING));
        let made = capsule.spec.as_option().expect("it has one");
        assert_eq!((made.vcpus, made.memory_mib, made.disk_mib), (whole.vcpus, whole.memory_mib, whole.disk_mib));
    }

    subject.delete_template(&name).await;
    assert_eq!(subject.template(&name).await, None);
    subject.delete_template(&name).await;
    let mut late = subject.spec();
    late.image.clone_from(&name);
    assert_eq!(subject.create(&late).await.expect_err("the template is gone").code, ErrorCode::NotFound);
    for spec in [&whole, &sizeless] {
        assert_eq!(subject.guest(&spec.id, "true", &[]).await.expect("it outlasts its template").1, 0);
        subject.pause(&spec.id).await.expect("it is paused without its template");
        subject.resume(&spec.id).await.expect("it is resumed without its template");
        subject.end(&spec.id).await;
    }
}

async fn templates_that_cannot_be(subject: &Subject) {
    let capsule = subject.running().await.id;
    let taken = name();
    subject.snapshot(&capsule, &taken).await.expect("a running capsule becomes a template");
    for (name, code) in [
        ("", ErrorCode::InvalidArgument),
        ("../up", ErrorCode::InvalidArgument),
        (".hidden", ErrorCode::InvalidArgument),
        ("Capital", ErrorCode::InvalidArgument),
        (&"x".repeat(65), ErrorCode::InvalidArgument),
        (&taken, ErrorCode::AlreadyExists),
        (&subject.image, ErrorCode::AlreadyExists),
    ] {
        let error = subject.snapshot(&capsule, name).await.expect_err("such a name is refused");
        assert_eq!(error.code, code, "{name}: {error}");
    }
    subject.delete_template(&taken).await;
    let free = name();
    subject.pause(&capsule).await.expect("a running capsule is paused");
    let error = subject.snapshot(&capsule, &free).await.expect_err("a paused capsule does not become a template");
    assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
    subject.end(&capsule).await;
    assert_eq!(subject.snapshot(&capsule, &free).await.expect_err("it has ended").code, ErrorCode::NotFound);
    assert_eq!(subject.template(&free).await, None);
}
