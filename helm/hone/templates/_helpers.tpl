{{- define "hone.selector" -}}
app.kubernetes.io/name: hone
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: service
{{- end }}

{{- define "hone.labels" -}}
{{ include "hone.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: hone
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "hone.image" -}}
{{- $build := "Hone publishes no images; build and push yours: docker build --target service -t REGISTRY/hone-service:TAG . && docker push REGISTRY/hone-service:TAG" -}}
{{- $repository := required (printf "image.repository is missing. %s" $build) .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* Where pods and callers of this cluster find the service; its certificate must be for this name. */ -}}
{{- define "hone.host" -}}
{{ .Release.Name }}.{{ .Release.Namespace }}.svc
{{- end }}

{{- /* Restricted Pod Security, and nothing that needs a certain user id. */ -}}
{{- define "hone.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* The values' `cluster:` as it stands; where it names nobody to report to, this service. */ -}}
{{- define "hone.cluster" -}}
{{- $cluster := deepCopy .Values.cluster -}}
{{- if not $cluster.report -}}
{{- $address := printf "%s:7465" (include "hone.host" .) -}}
{{- $_ := set $cluster "report" (dict "address" $address "ca_config_map" (dict "name" "hone-service-ca")) -}}
{{- end -}}
{{- toYaml $cluster -}}
{{- end }}
