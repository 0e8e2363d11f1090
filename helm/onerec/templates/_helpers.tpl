{{/* Where Kubeflow Pipelines and Ray run for this release. */}}
{{- define "onerec.pipelines.namespace" -}}
{{- default .Release.Namespace .Values.pipelines.namespace -}}
{{- end -}}

{{/* Names and labels ------------------------------------------------------------------------------------------- */}}

{{- define "onerec.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short, because KServe, Jobs and StatefulSets append to it. */}}
{{- define "onerec.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "onerec.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "onerec.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Which pods are whose: {root, component}. Never changes between versions of the chart. */}}
{{- define "onerec.selector" -}}
app.kubernetes.io/name: {{ include "onerec.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of an object: {root, component}. */}}
{{- define "onerec.labels" -}}
{{ include "onerec.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: onerec
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: {root, component}. Without the version, so that an upgrade restarts only what it changes. */}}
{{- define "onerec.podLabels" -}}
{{ include "onerec.selector" . }}
app.kubernetes.io/part-of: onerec
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "onerec.serviceAccountName" -}}
{{- if .root.Values.serviceAccounts.create -}}
{{- printf "%s-%s" (include "onerec.fullname" .root) .component -}}
{{- else -}}
{{- .root.Values.serviceAccounts.name -}}
{{- end -}}
{{- end -}}

{{/* Pods ------------------------------------------------------------------------------------------------------- */}}

{{/* Tag of one of our images: {root, name}. The plain builds of torch would hold a GPU and compute beside it. */}}
{{- define "onerec.tag" -}}
{{- $values := .root.Values -}}
{{- $serve := or $values.serving.predictor.gpu.enabled (and $values.rollout.enabled $values.rollout.gpu.enabled) -}}
{{- $gpu := get (dict "serve" $serve "train" (and $values.training.enabled $values.training.workers.gpu.enabled) "pipelines" false) .name -}}
{{- default (printf "%s%s" .root.Chart.AppVersion (ternary "-cuda" "" $gpu)) (index $values.image .name).tag -}}
{{- end -}}

{{/* One of our images: {root, name}. */}}
{{- define "onerec.image" -}}
{{- $image := index .root.Values.image .name -}}
{{- $repository := printf "%s/%s" .root.Values.image.registry $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (include "onerec.tag" .) -}}
{{- end -}}
{{- end -}}

{{/* What every pod of ours begins with: {root, component}. Nothing here asks the Kubernetes API, hence no token. */}}
{{- define "onerec.pod" -}}
serviceAccountName: {{ include "onerec.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where pods go: {root, component, at}; `at` has the values of the workload. */}}
{{- define "onerec.placement" -}}
{{- with .at.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .at.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .at.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if hasKey .at "topologySpreadConstraints" }}
topologySpreadConstraints:
  {{- if .at.topologySpreadConstraints }}
  {{- toYaml .at.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "onerec.selector" . | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Security of a container and what it pulls: {root, name}. */}}
{{- define "onerec.container" -}}
image: {{ include "onerec.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
{{- end -}}

{{/* Resources with GPUs: {resources, gpu}. */}}
{{- define "onerec.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if and .gpu .gpu.enabled -}}
{{- $count := dict .gpu.resource (printf "%d" (int .gpu.count)) -}}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) $count) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Pods restart when what they read from the ConfigMap changes. */}}
{{- define "onerec.checksum" -}}
checksum/environment: {{ include "onerec.environment" . | sha256sum | trunc 32 }}
{{- end -}}

{{/* Addresses and credentials -------------------------------------------------------------------------------------- */}}

{{- define "onerec.objectStore.url" -}}
{{- if .Values.seaweedfs.enabled -}}
http://{{ include "onerec.fullname" . }}-seaweedfs.{{ .Release.Namespace }}:8333
{{- else -}}
{{- .Values.objectStore.endpoint | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* host:port, which the S3 client takes; the port of the scheme when none is given. */}}
{{- define "onerec.objectStore.address" -}}
{{- $url := include "onerec.objectStore.url" . -}}
{{- $host := regexReplaceAll "^https?://" $url "" -}}
{{- if contains ":" $host -}}{{ $host }}{{- else -}}{{ $host }}:{{ if hasPrefix "https" $url }}443{{ else }}80{{ end }}{{- end -}}
{{- end -}}

{{- define "onerec.objectStore.port" -}}
{{- include "onerec.objectStore.address" . | splitList ":" | last -}}
{{- end -}}

{{- define "onerec.redis.address" -}}
{{- if .Values.valkey.enabled -}}
{{ include "onerec.fullname" . }}-valkey.{{ .Release.Namespace }}:6379
{{- else -}}
{{- .Values.redis.address -}}
{{- end -}}
{{- end -}}

{{- define "onerec.redis.port" -}}
{{- include "onerec.redis.address" . | splitList ":" | last -}}
{{- end -}}

{{/* Where clients inside the cluster ask for recommendations: our own Service, or Knative's. */}}
{{- define "onerec.server.url" -}}
http://{{ include "onerec.fullname" . }}-{{ ternary "predictor" "server" (eq .Values.serving.mode "Knative") }}.{{ .Release.Namespace }}
{{- end -}}

{{/* The settings of features/settings.py that are no secret. */}}
{{- define "onerec.environment" -}}
ONEREC_HOME: /data
ONEREC_S3_ENDPOINT: {{ include "onerec.objectStore.address" . | quote }}
ONEREC_S3_SECURE: {{ include "onerec.objectStore.url" . | hasPrefix "https" | quote }}
ONEREC_BUCKET: {{ .Values.objectStore.bucket | quote }}
ONEREC_REDIS: {{ include "onerec.redis.address" . | quote }}
ONEREC_COLLECTOR_URL: http://{{ include "onerec.fullname" . }}-collector.{{ .Release.Namespace }}:8000
ONEREC_SERVER_URL: {{ include "onerec.server.url" . }}
ONEREC_ROLLOUT_URL: {{ if .Values.rollout.enabled }}http://{{ include "onerec.fullname" . }}-rollout.{{ .Release.Namespace }}:8080{{ else }}""{{ end }}
ONEREC_EVIDENTLY_URL: {{ if .Values.evidently.enabled }}http://{{ include "onerec.fullname" . }}-evidently.{{ .Release.Namespace }}:8000{{ else }}""{{ end }}
ONEREC_INFERENCE_SERVICE: {{ if .Values.serving.enabled }}{{ .Release.Namespace }}/{{ include "onerec.fullname" . }}{{ else }}""{{ end }}
ONEREC_PATHWAYS: {{ .Values.settings.pathways | quote }}
ONEREC_LATE_HOURS: {{ .Values.settings.lateHours | quote }}
ONEREC_RETENTION_DAYS: {{ .Values.settings.retentionDays | quote }}
OMP_WAIT_POLICY: PASSIVE
HOME: /tmp
{{- end -}}

{{- define "onerec.envFrom" -}}
- configMapRef:
    name: {{ include "onerec.fullname" . }}-environment
{{- end -}}

{{/* One variable from a Secret: {name, secret, key}. */}}
{{- define "onerec.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end -}}

{{- define "onerec.env.objectStore" -}}
{{ include "onerec.secretEnv" (dict "name" "ONEREC_S3_ACCESS_KEY" "secret" .Values.objectStore.existingSecret "key" .Values.objectStore.accessKeyKey) }}
{{ include "onerec.secretEnv" (dict "name" "ONEREC_S3_SECRET_KEY" "secret" .Values.objectStore.existingSecret "key" .Values.objectStore.secretKeyKey) }}
{{- end -}}

{{- define "onerec.env.redis" -}}
{{ include "onerec.secretEnv" (dict "name" "ONEREC_REDIS_PASSWORD" "secret" .Values.redis.existingSecret "key" .Values.redis.passwordKey) }}
{{- end -}}

{{- define "onerec.env.serverToken" -}}
{{ include "onerec.secretEnv" (dict "name" "ONEREC_SERVER_TOKEN" "secret" .Values.tokens.existingSecret "key" .Values.tokens.serverKey) }}
{{- end -}}

{{- define "onerec.env.adminToken" -}}
{{- if .Values.tokens.adminKey -}}
{{ include "onerec.secretEnv" (dict "name" "ONEREC_ADMIN_TOKEN" "secret" .Values.tokens.existingSecret "key" .Values.tokens.adminKey) }}
{{- end -}}
{{- end -}}

{{- define "onerec.env.clientToken" -}}
{{ include "onerec.secretEnv" (dict "name" "ONEREC_CLIENT_TOKEN" "secret" .Values.tokens.existingSecret "key" .Values.tokens.clientKey) }}
{{- end -}}

{{/*
Feast's registry is a file without a lock that says what the code already says: each pod writes its own before it
starts, from the definitions of its image. {root, name}
*/}}
{{- define "onerec.registryInit" -}}
- name: registry
  {{- include "onerec.container" . | nindent 2 }}
  command: [python, -m, features.repository]
  envFrom:
    {{- include "onerec.envFrom" .root | nindent 4 }}
  resources:
    requests: {cpu: 100m, memory: 256Mi}
    limits: {memory: 1Gi}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: data, mountPath: /data}
{{- end -}}

{{/* Whether an optional custom resource is wanted: {root, enabled, api}; prints "true" or nothing. */}}
{{- define "onerec.wanted" -}}
{{- if or (eq (toString .enabled) "true") (and (eq (toString .enabled) "auto") (.root.Capabilities.APIVersions.Has .api)) -}}
true
{{- end -}}
{{- end -}}
