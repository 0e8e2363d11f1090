{{/* A model server's container: {root, args, resources, gpu, env, ready, port, patience}. KServe looks for its name. */}}
{{- define "onerec.serving.container" -}}
- name: kserve-container
  {{- include "onerec.container" (dict "root" .root "name" "serve") | nindent 2 }}
  command: [python, -m, models.serving]
  args:
    {{- range .args }}
    - {{ . }}
    {{- end }}
  envFrom:
    {{- include "onerec.envFrom" .root | nindent 4 }}
  env:
    {{- .env | nindent 4 }}
  ports:
    - {name: {{ .port }}, containerPort: 8080}
    {{- if ne .port "http1" }}
    - {name: grpc, containerPort: 8081}
    {{- end }}
  # Alive long before it is ready: it waits for a first bundle as long as it takes, and fetches and warms up large ones.
  # A rollout server is not: it has its bundle before it listens.
  startupProbe:
    httpGet: {path: /v2/health/live, port: 8080}
    periodSeconds: 5
    failureThreshold: {{ .patience | default 60 }}
  readinessProbe:
    httpGet: {path: {{ .ready }}, port: 8080}
    periodSeconds: 5
    timeoutSeconds: 2
  livenessProbe:
    httpGet: {path: /v2/health/live, port: 8080}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
  resources:
    {{- include "onerec.resources" . | nindent 4 }}
  volumeMounts:
    - {name: data, mountPath: /data}
    - {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* Volumes of a model server: {size}. */}}
{{- define "onerec.serving.volumes" -}}
- name: data
  emptyDir: {sizeLimit: {{ .size }}}
- name: tmp
  emptyDir: {sizeLimit: 2Gi}
{{- end -}}

{{/* Labels and annotations of a component's pods: {root, component}. */}}
{{- define "onerec.serving.metadata" -}}
labels:
  {{- include "onerec.podLabels" . | nindent 2 }}
annotations:
  {{- include "onerec.checksum" .root | nindent 2 }}
{{- end -}}

{{/* The predictor's pod: {root, role, alias}. */}}
{{- define "onerec.serving.predictor" -}}
{{- $serving := .root.Values.serving -}}
{{- $predictor := $serving.predictor -}}
{{- $whole := eq .role "all" -}}
{{- $ctx := dict "root" .root "component" "serving" "at" $predictor "name" "serve" -}}
{{- $args := list (printf "--role=%s" .role) "--host=0.0.0.0" "--port=8080" "--grpc_port=8081" "--drain_s=10" (printf "--model=%s=%s" $serving.model .alias) -}}
{{- if $predictor.bf16 }}{{ $args = append $args "--bf16" }}{{ end -}}
{{- if $predictor.threads }}{{ $args = append $args (printf "--threads=%d" (int $predictor.threads)) }}{{ end -}}
{{- $args = concat $args $predictor.extraArgs -}}
{{- $env := list (include "onerec.env.objectStore" .root) (include "onerec.env.adminToken" .root) -}}
{{- if $whole }}{{ $env = concat $env (list (include "onerec.env.redis" .root) (include "onerec.env.serverToken" .root)) }}{{ end -}}
{{- $env = $env | compact | join "\n" -}}
{{- include "onerec.pod" $ctx }}
{{- with include "onerec.placement" (set $ctx "component" "predictor") | trim }}
{{ . }}
{{- end }}
terminationGracePeriodSeconds: 60
{{- if $whole }}
initContainers:
  {{- include "onerec.registryInit" $ctx | nindent 2 }}
{{- end }}
containers:
  {{- include "onerec.serving.container" (dict "root" .root "args" $args "resources" $predictor.resources "gpu" $predictor.gpu "env" $env "ready" (printf "/v2/models/%s/ready" $serving.model) "port" (ternary "http1" "http" (eq $serving.mode "Knative"))) | nindent 2 }}
volumes:
  {{- include "onerec.serving.volumes" (dict "size" $predictor.cacheSize) | nindent 2 }}
{{- end -}}

{{/* The transformer's pod. */}}
{{- define "onerec.serving.transformer" -}}
{{- $serving := .Values.serving -}}
{{- $ctx := dict "root" . "component" "serving" "at" $serving.transformer "name" "serve" -}}
{{- $host := printf "%s-predictor-grpc.%s:8081" (include "onerec.fullname" .) .Release.Namespace -}}
{{- /* KServe appends --model_name, --http_port and a --predictor_host without port, unless they are here. */ -}}
{{- $args := list "--role=transformer" "--host=0.0.0.0" "--http_port=8080" "--grpc_port=8081" "--drain_s=10" (printf "--model=%s" $serving.model) (printf "--model_name=%s" $serving.model) (printf "--predictor_host=%s" $host) -}}
{{- $args = concat $args $serving.transformer.extraArgs -}}
{{- include "onerec.pod" $ctx }}
{{- with include "onerec.placement" (set $ctx "component" "transformer") | trim }}
{{ . }}
{{- end }}
terminationGracePeriodSeconds: 60
initContainers:
  {{- include "onerec.registryInit" $ctx | nindent 2 }}
containers:
  {{- $env := list "- {name: OMP_NUM_THREADS, value: \"1\"}" (include "onerec.env.redis" .) (include "onerec.env.serverToken" .) (include "onerec.env.adminToken" .) | compact | join "\n" -}}
  {{- include "onerec.serving.container" (dict "root" . "args" $args "resources" $serving.transformer.resources "env" $env "ready" (printf "/v2/models/%s/ready" $serving.model) "port" "http") | nindent 2 }}
volumes:
  {{- include "onerec.serving.volumes" (dict "size" "4Gi") | nindent 2 }}
{{- end -}}

{{/* Replicas of one role: {serving, role}. An autoscaler of ours (KEDA) owns the number alone. */}}
{{- define "onerec.serving.replicas" -}}
{{- $range := index .serving.autoscaling .role -}}
{{- if eq .serving.autoscaling.class "none" }}
minReplicas: {{ (index .serving .role).replicas }}
maxReplicas: {{ (index .serving .role).replicas }}
{{- else if eq .serving.autoscaling.class "hpa" }}
minReplicas: {{ $range.minReplicas }}
maxReplicas: {{ $range.maxReplicas }}
scaleMetric: cpu
scaleTarget: {{ .serving.autoscaling.targetCpuPercent }}
{{- end }}
{{- end -}}
