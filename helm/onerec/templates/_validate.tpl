{{/*
Combinations that the schema cannot judge. Each problem is one sentence that says what to change; all are shown at once.
*/}}
{{- define "onerec.validate" -}}
{{- $problems := concat (include "onerec.problems.addresses" . | fromJsonArray) (include "onerec.problems.serving" . | fromJsonArray) (include "onerec.problems.rest" . | fromJsonArray) -}}
{{- if $problems -}}
{{- printf "\n\nThe values of onerec cannot work:\n* %s\n" (join "\n* " $problems) | fail -}}
{{- end -}}
{{- end -}}

{{- define "onerec.problems.addresses" -}}
{{- $found := list -}}
{{- with .Values -}}
{{- if not .objectStore.existingSecret -}}
{{- $found = append $found (printf "objectStore.existingSecret is empty: make a Secret with the keys %s and %s and give its name" .objectStore.accessKeyKey .objectStore.secretKeyKey) -}}
{{- end -}}
{{- if not .redis.existingSecret -}}
{{- $found = append $found (printf "redis.existingSecret is empty: make a Secret with the key %s and give its name" .redis.passwordKey) -}}
{{- end -}}
{{- if not .tokens.existingSecret -}}
{{- $found = append $found (printf "tokens.existingSecret is empty: make a Secret with the keys %s and %s, two different random strings, and give its name" .tokens.clientKey .tokens.serverKey) -}}
{{- end -}}
{{- if and .tokens.existingSecret (eq .tokens.clientKey .tokens.serverKey) -}}
{{- $found = append $found (printf "tokens.clientKey and tokens.serverKey are both %s: clients would hold the server's token; give two keys" .tokens.clientKey) -}}
{{- end -}}
{{- if and .seaweedfs.enabled .objectStore.endpoint -}}
{{- $found = append $found (printf "seaweedfs.enabled and objectStore.endpoint (%s) are both given: empty the endpoint, or set seaweedfs.enabled=false" .objectStore.endpoint) -}}
{{- else if and (not .seaweedfs.enabled) (not .objectStore.endpoint) -}}
{{- $found = append $found "objectStore.endpoint is empty: give the URL of an S3 endpoint such as https://s3.eu-central-1.amazonaws.com, or set seaweedfs.enabled=true for a trial" -}}
{{- else if and .objectStore.endpoint (not (regexMatch "^https?://[^/:@]+(:[0-9]+)?/?$" .objectStore.endpoint)) -}}
{{- $found = append $found (printf "objectStore.endpoint is %s: give scheme, host and port alone, such as https://s3.example.com:443" .objectStore.endpoint) -}}
{{- end -}}
{{- if and .objectStore.requireTls (or .seaweedfs.enabled (hasPrefix "http://" .objectStore.endpoint)) -}}
{{- $found = append $found (printf "objectStore.requireTls is true but %s speaks http: give an https:// endpoint, or set objectStore.requireTls=false to send credentials in clear text" (ternary "the trial store (seaweedfs)" .objectStore.endpoint .seaweedfs.enabled)) -}}
{{- end -}}
{{- if and .valkey.enabled .redis.address -}}
{{- $found = append $found (printf "valkey.enabled and redis.address (%s) are both given: empty the address, or set valkey.enabled=false" .redis.address) -}}
{{- else if and (not .valkey.enabled) (not .redis.address) -}}
{{- $found = append $found "redis.address is empty: give host:port of a Redis or Valkey, or set valkey.enabled=true for a trial" -}}
{{- end -}}
{{- end -}}
{{- $found | toJson -}}
{{- end -}}

{{- define "onerec.problems.serving" -}}
{{- $found := list -}}
{{- with .Values.serving -}}
{{- if .enabled -}}
{{- if and .predictor.gpu.enabled (lt (int .predictor.gpu.count) 1) -}}
{{- $found = append $found (printf "serving.predictor.gpu.count is %v: give 1 or more, or set serving.predictor.gpu.enabled=false to serve on CPUs" .predictor.gpu.count) -}}
{{- end -}}
{{- if and .canary.enabled (ne .autoscaling.class "none") -}}
{{- $found = append $found (printf "serving.canary.enabled cannot go with serving.autoscaling.class=%s: KServe keeps a canary's pods at a fixed share; set serving.autoscaling.class=none while it runs" .autoscaling.class) -}}
{{- end -}}
{{- if and .canary.enabled .transformer.enabled -}}
{{- $found = append $found "serving.canary.enabled needs serving.transformer.enabled=false: KServe splits traffic in front of predictors, and a transformer would call the stable one past the split" -}}
{{- end -}}
{{- if and .canary.enabled (eq .canary.alias .alias) -}}
{{- $found = append $found (printf "serving.canary.alias is %s, which the stable servers follow too: give the alias of the candidate" .canary.alias) -}}
{{- end -}}
{{- if and (eq .mode "Knative") .transformer.enabled -}}
{{- $found = append $found "serving.mode=Knative needs serving.transformer.enabled=false: a Knative container has one port, and transformer and predictor talk gRPC beside HTTP" -}}
{{- end -}}
{{- if and (eq .mode "Knative") (ne .autoscaling.class "none") -}}
{{- $found = append $found (printf "serving.mode=Knative cannot go with serving.autoscaling.class=%s: Knative scales itself; set serving.autoscaling.class=none" .autoscaling.class) -}}
{{- end -}}
{{- if and (eq .autoscaling.class "keda") (not .autoscaling.keda.prometheusUrl) -}}
{{- $found = append $found "serving.autoscaling.keda.prometheusUrl is empty: give the URL of the Prometheus that scrapes this release" -}}
{{- end -}}
{{- range $role := list "predictor" "transformer" -}}
{{- $range := index $.Values.serving.autoscaling $role -}}
{{- if gt (int $range.minReplicas) (int $range.maxReplicas) -}}
{{- $found = append $found (printf "serving.autoscaling.%s.minReplicas (%v) is above maxReplicas (%v): exchange them" $role $range.minReplicas $range.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $found | toJson -}}
{{- end -}}

{{- define "onerec.problems.rest" -}}
{{- $found := list -}}
{{- with .Values -}}
{{- if and .rollout.enabled (not .rollout.version) -}}
{{- $found = append $found "rollout.version is empty: give the version whose weights the rollout servers start with (`onerec bundles list` shows them)" -}}
{{- end -}}
{{- if and .rollout.enabled (not .tokens.adminKey) -}}
{{- $found = append $found (printf "tokens.adminKey is empty: rollout servers take weights from administrators alone; give the key of their token in Secret %s" .tokens.existingSecret) -}}
{{- end -}}
{{- if and .rollout.enabled .rollout.gpu.enabled (lt (int .rollout.gpu.count) 1) -}}
{{- $found = append $found (printf "rollout.gpu.count is %v: give 1 or more, or set rollout.gpu.enabled=false" .rollout.gpu.count) -}}
{{- end -}}
{{- if and .training.enabled .training.workers.gpu.enabled (lt (int .training.workers.gpu.count) 1) -}}
{{- $found = append $found (printf "training.workers.gpu.count is %v: give 1 or more, or set training.workers.gpu.enabled=false to train on CPUs" .training.workers.gpu.count) -}}
{{- end -}}
{{- if and (or .training.enabled .schedules.enabled) (not .pipelines.existingSecret) -}}
{{- $found = append $found (printf "pipelines.existingSecret is empty: make a Secret in namespace %s with the keys ONEREC_S3_ACCESS_KEY, ONEREC_S3_SECRET_KEY, ONEREC_REDIS_PASSWORD and ONEREC_SERVER_TOKEN and give its name, or set training.enabled and schedules.enabled to false" (include "onerec.pipelines.namespace" $)) -}}
{{- end -}}
{{- if and .rollout.enabled .rollout.keda.enabled (not .rollout.keda.prometheusUrl) -}}
{{- $found = append $found "rollout.keda.prometheusUrl is empty: give the URL of the Prometheus that scrapes this release" -}}
{{- end -}}
{{- if and .collector.ingress.enabled (not .collector.ingress.host) -}}
{{- $found = append $found "collector.ingress.host is empty: give the host name under which clients reach the collector" -}}
{{- end -}}
{{- if and .collector.ingress.enabled (not .collector.ingress.tlsSecret) -}}
{{- $found = append $found "collector.ingress.tlsSecret is empty: give the Secret of the certificate; bearer tokens do not travel in clear text" -}}
{{- end -}}
{{- if and (not .serviceAccounts.create) (not .serviceAccounts.name) -}}
{{- $found = append $found "serviceAccounts.create is false and serviceAccounts.name is empty: give the name of an existing ServiceAccount" -}}
{{- end -}}
{{- range .schedules.items -}}
{{- if and $.Values.schedules.enabled (ne (len (regexFindAll "[^ ]+" .cron -1)) 6) -}}
{{- $found = append $found (printf "schedules.items: the cron of %s is %q: Kubeflow Pipelines wants six fields, seconds first, such as \"0 5 * * * *\"" .name .cron) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $found | toJson -}}
{{- end -}}
